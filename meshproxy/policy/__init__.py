"""Decisions: catalogue, prices, tokens, templates, failover, health of routes. Pure: no I/O, and no clock is read."""

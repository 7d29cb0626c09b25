"""A deterministic simulation of the gateway and its world: see docs/simulation.md, and `run` for how to use it."""

"""Metrics, logs and background tasks."""

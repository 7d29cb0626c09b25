"""Metrics, logs, spans and supervised background tasks."""

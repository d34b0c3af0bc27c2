"""Held-out evaluation and the report: metrics, answers to tasks, what the connector reads. No training here."""

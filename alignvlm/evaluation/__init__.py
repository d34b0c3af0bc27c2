"""Held-out evaluation and the report: metrics, generation over tasks, pictures of what a model reads. No training here."""

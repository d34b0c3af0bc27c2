"""Evaluation on held-out data: tasks, answers, scores, and the vocabulary tokens that the connector uses."""

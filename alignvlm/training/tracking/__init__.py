"""Trackers (MLflow, TensorBoard, Weights & Biases) that mirror the run folder, each in a process of its own."""

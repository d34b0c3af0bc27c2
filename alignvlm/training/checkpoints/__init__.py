"""Checkpoints of a stage, written in the background and loaded by any number of ranks; exports to Hugging Face."""

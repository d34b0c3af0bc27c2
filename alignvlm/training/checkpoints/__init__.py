"""Checkpoints of a stage: written in the background, valid by a manifest, loaded by any number of ranks."""

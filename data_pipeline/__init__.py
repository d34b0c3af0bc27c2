"""Indexed WebDataset shards, and a training order that is a pure function: plan, packing, loader.

Knows nothing of models: an encoder (`schema.Encoder`) measures and encodes samples. Nothing is imported here.
"""

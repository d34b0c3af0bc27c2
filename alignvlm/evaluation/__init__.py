"""Evaluation of exports: held-out tasks and texts, published benchmarks, and the tokens that the connector uses."""

"""Callbacks that look after ranks: how long a step may take, and whether a rank still computes what it should."""

"""Sections of a recipe's schema that fill a file of their own; schema.py puts all of them together."""

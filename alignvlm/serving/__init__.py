"""Serving an exported model: chat in the terminal."""

"""Serving an exported model: chat in the terminal, and a server with OpenAI's API."""

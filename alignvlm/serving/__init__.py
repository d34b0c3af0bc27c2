"""Serving an exported model: chat in the terminal, a server with OpenAI's API, the demo page, plugins for servers."""

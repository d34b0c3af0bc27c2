"""The demo page: ask a model about images in a browser, and see what the connector turned their patches into."""

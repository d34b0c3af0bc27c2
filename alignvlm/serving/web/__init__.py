"""HTTP without models: connections, limits, errors in OpenAI's shape, images that are fetched."""

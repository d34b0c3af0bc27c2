"""From data as people have it to shards."""

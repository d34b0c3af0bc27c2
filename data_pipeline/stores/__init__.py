"""Object stores: their requests, the processes that may make them, the cache of a node, reading ahead."""

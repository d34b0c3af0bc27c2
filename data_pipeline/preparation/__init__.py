"""Shards of large data made by many processes or machines: idempotent tasks, and the engines that run them."""

"""Shards on disk: storage, tar scan, index, writer, reader, measured sources, verification."""

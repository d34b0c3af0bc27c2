"""Rows of published files (JSON, parquet, Arrow), cut into ranges that any process can read by itself."""

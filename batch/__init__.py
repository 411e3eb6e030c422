"""Batch jobs over kvfs: lazy partitioned data frames over DuckDB. Nothing is built here yet; ARCHITECTURE.md says what will be."""

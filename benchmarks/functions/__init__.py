"""Handlers that the Lambda benchmarks run in real environments."""

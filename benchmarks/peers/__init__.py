"""The ways to score Parquet files that `benchmarks/batch.py` holds beside one another; each module is a program of its own."""

"""The Ray Data form: scores Parquet files with a model of a repository, each row exactly once.

python -m batch run    plan.py -> pool.py (Ray Data) -> actor.py -> triform/scoring.py -> commit.py
batch.stage.Predict    the same answers in a Ray Data pipeline of your own
python -m batch verify checks a committed run against its manifest
"""

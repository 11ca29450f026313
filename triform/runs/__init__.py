"""A run of a model over files, wherever it is driven from: planned, kept in a folder, committed once. No Ray in here.

inputs.py -> plan.py -> folder.py (triform/scoring.py fills it) -> commit.py (keys.py) -> pointer.py
"""

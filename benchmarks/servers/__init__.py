"""The servers that `benchmarks/serving.py` holds beside one another.

Each module but `model.py`, `ways.py` and `running.py` is a program of its own, the simplest that the server's own documentation
recommends. All open the same file with the same options (`model.py`), one worker and one ONNX Runtime thread each.
"""

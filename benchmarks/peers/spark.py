"""PySpark's `mapInPandas` in local mode, with Arrow; run by the Python of an environment that has pyspark.

    python -m benchmarks.peers.spark TASK

A small job first starts Spark's Python workers, loads the model in them and warms the JVM; none of that counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from benchmarks.peers.task import BATCH_ROWS, Scorer, finish, read_task, stacked

KINDS = {"int64": "bigint", "float32": "float"}


@cache
def scorer(path: str) -> Scorer:
    """One for each worker, which Spark keeps from task to task."""
    return Scorer(read_task(path))


def answered(path: str, frames: Iterator[Any]) -> Iterator[Any]:
    """pandas frames in, pandas frames out: the carried columns and the answers."""
    import pandas as pd

    score = scorer(path)
    task = score.task
    for frame in frames:
        complete = frame.dropna(subset=task.required)
        feed = {}
        for tensor, names in task.inputs.items():
            if tensor in task.text:
                codes, distinct = pd.factorize(complete[names[0]])
                feed[tensor] = distinct.to_numpy(dtype=str)[codes].reshape(-1, 1)
            else:
                columns = (complete[name].to_numpy() for name in names)
                feed[tensor] = stacked(columns, len(complete), len(names))
        answers = {name: column.to_numpy() for name, column in score.answers(feed).items()}
        yield complete[task.carried].assign(**answers)


def main() -> None:
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as f

    path = sys.argv[1]
    task = read_task(path)
    spark = (
        SparkSession.builder.master(f"local[{task.workers}]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.memory", "2g")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", str(BATCH_ROWS))
        .config("spark.sql.parquet.compression.codec", "zstd")
        .config("spark.io.compression.zstd.level", "1")
        .config("spark.hadoop.parquet.compression.codec.zstd.level", "1")
        .config("spark.executorEnv.PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    source = spark.read.parquet(*task.files).select(*task.columns)
    decimals = [name for name, kind in source.dtypes if kind.startswith("decimal")]
    source = source.withColumns({name: f.col(name).cast("double") for name in decimals}) if decimals else source
    kinds = dict(source.dtypes)
    answers = {name: KINDS[dtype] for name, (_, _, dtype) in task.outputs.items()}
    schema = ", ".join(f"`{name}` {kind}" for name, kind in ({n: kinds[n] for n in task.carried} | answers).items())

    def score(frames: Iterator[Any]) -> Iterator[Any]:
        from benchmarks.peers.spark import answered

        return answered(path, frames)

    warm = source.limit(task.workers * 1_000).repartition(task.workers)
    warm.mapInPandas(score, schema).write.format("noop").mode("overwrite").save()
    begin = time.time()
    scored = source.mapInPandas(score, schema)
    stamps = {"_model_version": f.lit(task.ref), "_scored_at": f.lit(int(begin)).cast("timestamp")}
    scored.withColumns(stamps).write.parquet(task.output)
    finish(task, begin=begin, end=time.time())
    spark.stop()


if __name__ == "__main__":
    main()

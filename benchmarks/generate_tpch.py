"""TPC-H line items as Parquet, by DuckDB's generator; run by the Python of an environment that has it (`datasets.environment`).

python benchmarks/generate_tpch.py FOLDER SCALE
"""

import sys
from pathlib import Path

import duckdb
import duckdb_extension_tpch

FILES = 8


def main() -> None:
    folder, scale = Path(sys.argv[1]), float(sys.argv[2])
    extension = next(Path(duckdb_extension_tpch.__file__).parent.rglob("tpch.duckdb_extension"))
    db = duckdb.connect()
    db.execute(f"LOAD '{extension}'")
    db.execute(f"CALL dbgen(sf = {scale})")
    last = db.execute("SELECT max(l_orderkey) FROM lineitem").fetchone()[0]
    for i in range(FILES):
        items = db.table("lineitem").filter(f"l_orderkey > {last * i // FILES} AND l_orderkey <= {last * (i + 1) // FILES}")
        items.write_parquet(str(folder / f"{i}.parquet"), compression="zstd")


if __name__ == "__main__":
    main()

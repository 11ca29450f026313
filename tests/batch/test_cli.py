"""`python -m batch`: what it prints, how it exits, and that nobody sees a traceback."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.batch.workbench import Cli, Workbench, assert_each_row_once, options, visible
from triform.runtime import RuntimeOptions


def test_a_run_and_its_check_for_people(workbench: Workbench, call: Cli) -> None:
    """In a folder whose name means something to a shell and to rich."""
    workbench.output = workbench.root / "a [red]b[/nope] 'c'" / ("long" * 30)
    workbench.write_some(2).score()
    code, out, err = call("run", *options(workbench))
    (run,) = workbench.output.glob("run=*")
    assert (code, err) == (0, "")
    assert_each_row_once(run, 200)
    for said in "lookup/1", "200 in = 172 answered + 28 dead letters", "20 missing_value", "8 run_failed", f"{run}/data":
        assert said in out
    command = shlex.split(next(line for line in out.splitlines() if "batch verify" in line))[1:]  # "verify", then the command
    assert command == ["python", "-m", "batch", "verify", str(run)]
    code, out, err = call(*command[3:])
    assert (code, err) == (0, "")
    assert "counts: 200 rows in = 172 answered + 28 dead letters" in out
    assert f"ok: {run}" in out


def test_a_run_and_its_check_for_programs(workbench: Workbench, call: Cli) -> None:
    workbench.write_some(2).score()
    code, out, err = call("run", "--json", *options(workbench))
    summary = json.loads(out)
    assert code == 0
    assert "2 part(s)" in err or "going on with run" in err
    assert (summary["manifest"]["rows_in"], summary["manifest"]["dead"]) == (200, {"missing_value": 20, "run_failed": 8})
    code, out, err = call("verify", "--json", summary["folder"])
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"] is True


def test_a_commented_toml_file_is_a_job(workbench: Workbench, call: Cli) -> None:
    file = workbench.root / "job.toml"
    file.write_text(
        f"""
        # Every night.
        repository = "{workbench.repository}"
        model = "lookup@stable"      # the released one
        input = ["{workbench.input}/*.parquet"]
        output = "{workbench.output}"
        key = ["id"]
        keep = ["note"]
        max_dead_letters = 0.0       # overridden
        """
    )
    workbench.write_some(1).score(input=(f"{workbench.input}/*.parquet",))
    assert call("run", file)[0] == 4
    assert call("run", file, "--max-dead-letters", "0.5")[0] == 0
    file.write_text(file.read_text().replace("keep =", "kept ="))
    code, _, err = call("run", file)
    assert code == 2
    assert "job.toml" in err
    assert "'kept'" in err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--actors=0"], 2, "actors"),
        (["--actors=2:1"], 2, "actors"),
        (["--max-dead-letters=2"], 2, "max_dead_letters"),
        (["--max-dead-letters=nan"], 2, "max_dead_letters"),
        (["--max-dead-letters=x"], 2, "max-dead-letters"),
        (["--cpus=0"], 2, "cpus"),
        (["--gpus=-1"], 2, "gpus"),
        (["--if-exists=append"], 2, "if_exists"),
        (["--model=../etc"], 2, "invalid_reference"),
        (["--model=absent"], 1, "model_not_found"),
        (["--model=lookup/7"], 1, "version_not_found"),
        (["--key=id", "--key=id"], 2, "key"),
        (["--keep=nope"], 2, "nope"),
        (["--input=absent"], 1, "nothing there: absent"),
        (["--nonsense"], 2, "--nonsense"),
        (["absent.toml"], 2, "absent.toml"),
        (["--output=/proc/nowhere"], 1, "the output failed"),
        (["--max-dead-letters=0.1"], 4, "missing_value 10, run_failed 4"),
    ],
    ids=str,
)
def test_exit_codes(workbench: Workbench, call: Cli, args: list[str], code: int, says: str) -> None:
    """2: what was asked cannot be right; 1: it was asked well and failed."""
    workbench.write_some(1).score(key=("id",), keep=("note",))
    got, out, err = call("run", *options(workbench), *args)
    assert (got, out) == (code, "") if code == 2 else got == code
    assert says in err
    assert visible(workbench.output) == []


def test_wrong_use(call: Cli, tmp_path: Path) -> None:
    assert call("verify", tmp_path)[0] == 1
    assert call("verify", tmp_path / "absent")[0] == 1
    assert call("verify")[0] == call("unknown")[0] == call()[0] == 2
    assert call("run")[0] == 2
    code, out, _ = call("--help")
    assert code == 0
    assert "Exit codes" in out


def test_a_check_that_fails_is_told_in_one_line(workbench: Workbench, call: Cli) -> None:
    summary = workbench.write_some(1).score_and_run()
    (Path(summary.data) / "stray.parquet").write_bytes(b"")
    code, out, err = call("verify", summary.folder)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert err.endswith("[not_reconciled]\n")


def test_the_module_runs(workbench: Workbench) -> None:
    workbench.write_some(1).score()
    done = subprocess.run([sys.executable, "-m", "batch", "run", *options(workbench)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_are_json_where_json_was_asked_for(call: Cli, workbench: Workbench) -> None:
    code, out, _ = call("run", *options(workbench.write_some(1)), "--if-exists=fail", "--model=nobody", "--json")
    assert code == 1
    assert json.loads(out)["code"] == "model_not_found"


def test_current_prints_what_a_reader_should_read(call: Cli, workbench: Workbench) -> None:
    assert call("current", workbench.output)[0] == 1
    summary = workbench.write_some(1).score_and_run()
    assert call("current", workbench.output)[:2] == (0, f"{summary.data}\n")
    assert json.loads(call("current", workbench.output, "--json")[1])["run"] == summary.manifest.run


def test_the_environment_names_repository_and_providers(call: Cli, workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [option for option in options(workbench.write_some(1)) if not option.startswith("--repository")]
    code, _, err = call("run", *given)
    assert (code, "TRIFORM_REPOSITORY" in err) == (2, True)
    monkeypatch.setenv("TRIFORM_REPOSITORY", str(workbench.repository))
    workbench.score()
    assert call("run", *given)[0] == 0
    monkeypatch.setenv("TRIFORM_BOGUS", "1")
    assert call("run", *given)[0] == 2


def test_required_providers_fail_closed_in_a_job(workbench: Workbench) -> None:
    (outcome,) = workbench.write_some(1).score(0, options=RuntimeOptions(required_providers=("CUDAExecutionProvider",)))
    assert outcome.code == "provider_unavailable"

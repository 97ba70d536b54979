"""A slower measurement is found, whatever else the files hold."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turbowan.bench.compare import compare
from turbowan.cli.main import app
from turbowan.errors import RequestError


def write(path, *cases, gpu="G"):
    """cases: names with milliseconds, or with what failed."""
    record = {"bench": "op norm", "gpu": gpu}
    found = lambda ms: {"failed": ms} if isinstance(ms, str) else {"ms": dict.fromkeys(("p20", "p50", "p80"), ms)}  # noqa: E731
    lines = [record | {"case": name, **found(ms)} for name, ms in cases]
    path.write_text("\n".join(map(json.dumps, [*lines, {"bench": "pipeline", "case": "x"}])) + "\n", encoding="utf-8")
    return path


def test_slower_cases_are_counted(tmp_path):
    old = write(tmp_path / "old.jsonl", ("S a", 1.0), ("S b", 2.0), ("S c", 3.0))
    new = write(tmp_path / "new.jsonl", ("S a", 1.04), ("S b", 2.2), ("S d", 9.0))
    rows, slower = compare([new], [old], 0.05)
    assert [(row["case"], row["ratio"]) for row in rows] == [("S a", 1.04), ("S b", 1.1), ("S c", None)]
    assert [row["verdict"] for row in rows] == ["ok", "slower", "missing"]
    assert slower == 1
    assert compare([new], [old], 0.2)[1] == 0
    again = write(tmp_path / "again.jsonl", ("S b", 2.0))
    assert compare([new, again], [old], 0.05)[1] == 0  # the faster of two runs counts
    (tmp_path / "recorded").mkdir()
    old.rename(tmp_path / "recorded" / "old.jsonl")
    assert compare([new], [tmp_path / "recorded"], 0.05) == (rows, slower)


def test_what_fails_now_is_a_regression(tmp_path):
    old = write(tmp_path / "old.jsonl", ("a", 1.0), ("b", 2.0))
    new = write(tmp_path / "new.jsonl", ("a", 1.0), ("b", "no kernel"), ("d", "never ran"))
    rows, worse = compare([new], [old], 0.05)
    assert worse == 1
    assert [(row["case"], row["verdict"], row["after_ms"]) for row in rows] == [("a", "ok", 1.0), ("b", "failed", None)]
    assert rows[1]["failed"] == "no kernel"
    again = write(tmp_path / "again.jsonl", ("b", 2.0))
    assert compare([new, again], [old], 0.05)[1] == 0  # it ran in one of two
    assert [row["case"] for row in compare([new], [new], 0.05)[0]] == ["a"]  # what never ran cannot get worse


def test_missing_cases_are_those_of_what_was_run_again(tmp_path):
    cases = [("14B-480p a", 1.0), ("14B-480p b", 2.0), ("14B-720p a", 3.0)]
    old = [write(tmp_path / "old.jsonl", *cases), write(tmp_path / "other.jsonl", *cases, gpu="H")]
    rows, worse = compare([write(tmp_path / "new.jsonl", *cases[:1])], old, 0.05)
    assert worse == 0
    assert [(row["case"], row["before_ms"], row["after_ms"], row["verdict"]) for row in rows] == [
        ("14B-480p a", 1.0, 1.0, "ok"), ("14B-480p b", 2.0, None, "missing"),
    ]  # fmt: skip


def test_a_folder_is_read_without_what_was_only_tried(tmp_path):
    (tmp_path / "recorded").mkdir()
    write(tmp_path / "recorded" / "op-norm.jsonl", ("a", 2.0))
    tried = [write(tmp_path / "recorded" / f"{name}.jsonl", ("a", 1.0)) for name in ("trials-a", "sweep-a", "profile")]
    new = write(tmp_path / "new.jsonl", ("a", 2.0))
    assert compare([new], [tmp_path / "recorded"], 0.05)[1] == 0
    assert all(compare([new], [file], 0.05)[1] == 1 for file in tried)  # unless it is named


def test_the_records_of_this_repository_are_compared_whole():
    (folder,) = (Path(__file__).parents[2] / "benchmarks" / "results").glob("nvidia-h200")
    rows, worse = compare([folder], [folder], 0.0)
    assert worse == 0
    assert {row["bench"] for row in rows} >= {"op attention", "op linear", "op norm", "op rope", "transformer"}
    assert {row["verdict"] for row in rows} == {"ok"}


def test_nothing_in_common_or_no_file(tmp_path):
    old, new = write(tmp_path / "old.jsonl", ("a", 1.0)), write(tmp_path / "new.jsonl", ("a", 1.0), gpu="other")
    with pytest.raises(RequestError, match="none in common"):
        compare([new], [old], 0.05)
    (tmp_path / "torn.jsonl").write_text("{", encoding="utf-8")
    for path in (tmp_path / "absent.jsonl", tmp_path / "torn.jsonl"):
        with pytest.raises(RequestError, match="no file of JSON lines"):
            compare([path], [old], 0.05)


def test_command_line_fails_on_a_regression(tmp_path):
    old, new = write(tmp_path / "old.jsonl", ("a", 1.0)), write(tmp_path / "new.jsonl", ("a", 1.5))
    run = lambda *more: CliRunner().invoke(app, ["bench", "compare", str(new), "--against", str(old), *more])  # noqa: E731
    assert run().exit_code == 1
    assert json.loads(run("--json").stdout)["ratio"] == 1.5
    title, header, row = run().stdout.splitlines()
    assert title == "1 recorded cases: 1 slower by more than 5% or failed, 0 missing"
    assert header.split()[:3] == ["bench", "case", "before"]
    assert row.split() == ["op", "norm", "a", "1.0", "1.5", "1.5", "slower"]
    assert run("--tolerance", "0.6").exit_code == 0
    write(new, ("a", "no kernel"))
    assert run("--tolerance", "0.6").exit_code == 1
    assert "no kernel" in run().stdout

"""A slower measurement is found, whatever else the files hold."""

import json

import pytest
from typer.testing import CliRunner

from turbowan.bench.compare import compare
from turbowan.cli.main import app
from turbowan.errors import RequestError


def write(path, *cases, gpu="G"):
    record = {"bench": "op norm", "gpu": gpu}
    lines = [record | {"case": name, "ms": dict.fromkeys(("p20", "p50", "p80"), ms)} for name, ms in cases]
    path.write_text("\n".join(map(json.dumps, [*lines, {"bench": "pipeline", "case": "x"}])) + "\n", encoding="utf-8")
    return path


def test_slower_cases_are_counted(tmp_path):
    old = write(tmp_path / "old.jsonl", ("a", 1.0), ("b", 2.0), ("c", 3.0))
    new = write(tmp_path / "new.jsonl", ("a", 1.04), ("b", 2.2), ("d", 9.0))
    rows, slower = compare([new], [old], 0.05)
    assert [(row["case"], row["ratio"]) for row in rows] == [("a", 1.04), ("b", 1.1)]
    assert slower == 1
    assert compare([new], [old], 0.2)[1] == 0
    again = write(tmp_path / "again.jsonl", ("b", 2.0))
    assert compare([new, again], [old], 0.05)[1] == 0  # the faster of two runs counts
    (tmp_path / "recorded").mkdir()
    old.rename(tmp_path / "recorded" / "old.jsonl")
    assert compare([new], [tmp_path / "recorded"], 0.05) == (rows, slower)


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
    assert json.loads(run().stdout)["ratio"] == 1.5
    assert run("--tolerance", "0.6").exit_code == 0

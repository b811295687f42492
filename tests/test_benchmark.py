"""The benchmark: rows run and end equal, and a row whose sides differ is refused."""

import importlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture
def parts(monkeypatch):
    """The modules beside the script."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return {n: importlib.import_module(f"benchmarks.{n}") for n in ("harness", "team", "report")}


def constant(job, value, units=1.0):
    """A side that has nothing to do."""
    team = importlib.import_module("benchmarks.team")
    return lambda: team.Run(np.full(3, value), units, seconds=0.01)


def failing(job):
    raise FileNotFoundError("no such digits")


def measured(parts, folder, *sides, repeats=2, **row):
    team, harness = parts["team"], parts["harness"]
    sides = [team.Side(name, prepare, **s) for name, prepare, s in sides]
    job = team.Job(root="", folder=str(folder))
    return harness.measure(harness.Row("r", "work", tuple(sides), **row), job, repeats)


def test_sides_with_one_result_have_a_ratio(parts, tmp_path):
    ours = ("ours", partial(constant, value=1.0, units=10.0), {})
    peer = ("peer", partial(constant, value=1.0 + 1e-6), {"faster": 5, "tolerance": 1e-5})
    slow = ("slow", partial(constant, value=1.0), {"at_most": 0.05})
    outcome = measured(parts, tmp_path, ours, peer, slow)
    assert outcome.refused is None
    # 0.01 s over 10 units against 0.01 s: a tenth, whatever the machine does.
    assert [round(side.ratio, 9) for side in outcome.sides] == [1, 0.1, 0.1]
    assert [side.reached for side in outcome.sides] == [None, True, False]
    assert outcome.sides[1].difference == pytest.approx(1e-6, rel=1e-6)
    # Rounds A B A B until 0.8 s a round have passed, and four times two at most.
    assert {len(side.seconds) for side in outcome.sides} == {8}


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_row_with_differing_results_is_refused(parts, tmp_path, value):
    sides = [(n, partial(constant, value=v), {}) for n, v in (("ours", 1.0), ("peer", value))]
    outcome = measured(parts, tmp_path, *sides)
    assert "the result of peer is" in outcome.refused
    assert "refused" in "".join(parts["report"].table([outcome]).columns[0]._cells)


def test_a_side_that_fails_is_refused(parts, tmp_path):
    good = ("ours", partial(constant, value=1.0), {})
    outcome = measured(parts, tmp_path, good, ("peer", failing, {}))
    assert "peer" in outcome.refused and "no such digits" in outcome.refused


@pytest.fixture
def main(parts):
    return importlib.import_module("benchmark").main


def test_quick_rows_end_equal(main, tmp_path, capsys):
    found = tmp_path / "found.json"
    words = ["--quick", "--only", "jacobian-linear,moments-2000", "--only", "minibatch"]
    words += ["--repeats", "1", "--json", str(found), "--data-root", str(tmp_path)]
    assert main(words) == 0
    rows = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert list(rows) == ["minibatch", "moments-2000", "jacobian-linear"]
    assert rows["minibatch"]["skipped"].startswith("needs the full MNIST")
    for name in ("moments-2000", "jacobian-linear"):
        row = rows[name]
        assert row["refused"] is None and row["skipped"] is None
        for side in row["sides"]:
            assert side["difference"] <= side["tolerance"] and min(side["seconds"]) > 0
            assert side["memory_bytes"] > 0
    printed = capsys.readouterr().out
    assert "fit by moments" in printed and "ms/update" in printed and "torch 2" in printed


def test_rows_are_listed_and_unknown_ones_named(main, capsys):
    assert main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(set(names)) == len(names) and {"minibatch", "command", "file"} <= set(names)
    assert main(["--only", "nothing"]) == 2
    assert "--only nothing" in capsys.readouterr().err

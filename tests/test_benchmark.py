"""The benchmark: rows run and end equal, and a row whose sides differ is refused."""

import json
from functools import partial

import numpy as np
import pytest
from rich.console import Console

import benchmark
from benchmarks import report
from benchmarks.harness import Row, measure
from benchmarks.team import Job, Run, Side


def constant(job, value, units=1.0):
    """A side that has nothing to do."""
    return lambda: Run(np.full(3, value), units, seconds=0.01)


def failing(job):
    raise FileNotFoundError("no such digits")


def measured(folder, *sides):
    return measure(Row("r", "work", sides), Job(root="", folder=str(folder)), repeats=2)


OURS = Side("ours", partial(constant, value=1.0))


def test_sides_with_one_result_have_a_ratio(tmp_path):
    ours = Side("ours", partial(constant, value=1.0, units=10.0))
    peer = Side("peer", partial(constant, value=1.0 + 1e-6), faster=5, tolerance=1e-5)
    slow = Side("slow", partial(constant, value=1.0), at_most=0.05)
    outcome = measured(tmp_path, ours, peer, slow)
    assert outcome.refused is None
    # 0.01 s over 10 units against 0.01 s: a tenth, whatever the machine does.
    assert [round(side.ratio, 9) for side in outcome.sides] == [1, 0.1, 0.1]
    assert [side.reached for side in outcome.sides] == [None, True, False]
    assert outcome.sides[1].difference == pytest.approx(1e-6, rel=1e-6)
    # Rounds A B A B until 0.8 s per round have passed, and four times two at most.
    assert {len(side.seconds) for side in outcome.sides} == {8}


@pytest.mark.parametrize(
    "prepare, reason",
    [
        (partial(constant, value=1.001), "the result of peer is 0.001 away from ours"),
        (partial(constant, value=float("nan")), "the result of peer is nan away from ours"),
        (failing, "no such digits"),
    ],
)
def test_a_row_whose_side_differs_or_fails_is_refused(tmp_path, capsys, prepare, reason):
    outcome = measured(tmp_path, OURS, Side("peer", prepare))
    assert outcome.refused and reason in outcome.refused and "peer" in outcome.refused
    Console(width=140).print(report.table([outcome]))
    assert "refused" in capsys.readouterr().out


def test_quick_rows_end_equal(tmp_path, capsys):
    found = tmp_path / "found.json"
    words = ["--quick", "--only", "jacobian-linear,moments-2000", "--only", "minibatch"]
    words += ["--repeats", "1", "--json", str(found), "--data-root", str(tmp_path)]
    assert benchmark.main(words) == 0
    rows = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert list(rows) == ["minibatch", "moments-2000", "jacobian-linear"]
    assert rows.pop("minibatch")["skipped"].startswith("needs the full MNIST")
    for row in rows.values():
        assert row["refused"] is None and row["skipped"] is None
        for side in row["sides"]:
            assert side["difference"] <= side["tolerance"] and min(side["seconds"]) > 0
            assert side["memory_bytes"] > 0
    printed = capsys.readouterr().out
    assert "fit by moments" in printed and "ms/update" in printed and "torch 2" in printed


def test_rows_are_listed_and_unknown_ones_named(capsys):
    assert benchmark.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(set(names)) == len(names) and {"minibatch", "command", "file"} <= set(names)
    assert benchmark.main(["--only", "nothing"]) == 2
    assert "--only nothing" in capsys.readouterr().err

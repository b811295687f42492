"""The notebooks' numbers against ours, through `scripts/reproduce.py`."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from lightning_gd.models.linear import LinearRegression
from lightning_gd.notebooks import golden
from lightning_gd.notebooks.reproduction import (
    FETCH,
    closing_line,
    lesson,
    notebook_digits,
    reproduce,
)
from lightning_gd.notebooks.verdicts import Band, Close, Law, compare

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce.py"
MNIST_ROOT = os.environ.get("MNIST_ROOT", "")
needs_mnist = pytest.mark.skipif(
    not MNIST_ROOT, reason="MNIST_ROOT does not name a folder with MNIST/raw"
)


@pytest.fixture
def main(monkeypatch):
    """The script's main function, where no digits are at hand."""
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main


def entry(printed, tolerance=None, kind="printed"):
    outputs = None if printed is None else {"value": printed}
    return golden.Entry("000", "e", kind, {}, "float32", "mean", 1, outputs, tolerance, "")


# Coverage


def test_every_entry_has_an_experiment_and_a_notebook():
    found = golden.entries()
    assert len(found) == 34
    assert golden.EXPERIMENTS.keys() == {e.experiment for e in found}
    assert {n for e in found for n in e.notebooks} == golden.NOTEBOOKS.keys()


def test_all_agree_that_need_no_mnist(main, capsys):
    assert main(["--explain"]) == 0
    printed = capsys.readouterr().out
    assert "31 of 31 experiments agree" in printed and "3 more need the full MNIST" in printed
    assert FETCH in printed and "differs" not in printed
    assert "each update multiplies it by 16" in printed
    assert "The largest stable learning rate is 2/50 = 0.04" in printed
    assert "At w = 0 it is -120" in printed and "is -30" in printed
    assert "holds 3, 6, 9; with zeroing 3, 3, 3" in printed
    assert "offline digits, not those of the notebook" in printed


@needs_mnist
def test_the_digits_agree_too():
    """With one of the three scalings; the command runs them all."""
    digits = notebook_digits(MNIST_ROOT)
    digits.scalings = ["standard"]
    results = list(reproduce(["002"], digits))
    assert closing_line(results) == "4 of 4 experiments agree with the notebooks"


# Wrong formulas

PLANTED = {
    "sum for mean": lambda gradient, n: gradient * n,
    "factor ½": lambda gradient, n: gradient / 2,
    "sign": lambda gradient, n: -gradient,
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_wrong_formula_fails(main, capsys, monkeypatch, mistake):
    right = LinearRegression.gradients

    def wrong(self, x, y):
        return {name: PLANTED[mistake](g, len(y)) for name, g in right(self, x, y).items()}

    monkeypatch.setattr(LinearRegression, "gradients", wrong)
    assert main(["003"]) == 1
    assert "differ: " in capsys.readouterr().out


def test_a_wrong_shortcut_fails_too(monkeypatch):
    """The road that the shipped model takes by itself, `loss_and_gradients`."""
    right = LinearRegression.loss_and_gradients

    def wrong(self, x, y):
        loss, gradients = right(self, x, y)
        return loss, {name: gradient / 2 for name, gradient in gradients.items()}

    monkeypatch.setattr(LinearRegression, "loss_and_gradients", wrong)
    verdicts = {r.entry.experiment: r.verdict for r in reproduce(["003"])}
    assert verdicts["torch_autograd_25"] == "differs"
    assert verdicts["numpy_sum_gradient_11"] == "agrees"  # NumPy knows nothing of the model


# The command


def test_missing_digits_fail_only_where_all_are_required(main, capsys):
    assert main(["002"]) == 0
    assert main(["002", "--require-all"]) == 1
    assert "1 of 1 experiments agree with the notebooks; 3 more need" in capsys.readouterr().out


def test_a_root_without_digits_and_an_unknown_notebook_are_refused(main, capsys, tmp_path):
    assert main(["002", "--data-root", str(tmp_path)]) == 2
    assert "does not hold the four files of MNIST" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["005"])
    assert "known: 000, 001" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["002", "--download"])


def test_list(main, capsys):
    assert main(["--list", "004"]) == 0
    printed = capsys.readouterr().out
    assert "grad_accumulation" in printed and "torch_forward" not in printed


def test_lesson_numbers_are_of_the_run():
    """Another number found is another number told."""
    results = list(reproduce(["000"]))
    law = next(r for r in results if r.entry.experiment == "divergence_law")
    law.facts["lr_max"] = 0.125
    assert "2/50 = 0.125" in lesson("000", results)


# The comparison


@pytest.mark.parametrize(
    ("printed", "ours", "tolerance", "agrees"),
    [
        (0.75, 0.75, {"mode": "exact"}, True),
        (0.75, 0.75 + 5e-17, {"mode": "exact"}, True),  # the same float64
        (0.75, 0.7500000001, {"mode": "exact"}, False),
        (0.75, 0.7500000001, {"mode": "exact", "fallback_rel": 1e-6}, True),
        ("1.680", 1.6804, {"mode": "exact"}, True),
        ("1.680", 1.6806, {"mode": "exact"}, False),
        ("-45.", -45.0, {"mode": "exact"}, True),
        (["[0 0]", "[1.8 3.6]"], np.array([[0, 0], [1.8, 3.6000001]]), {"mode": "exact"}, True),
        (["[0 0]", "[1.8 3.6]"], np.array([[0, 0], [1.8, 3.7]]), {"mode": "exact"}, False),
        ({"0": 67.5, "2": 1.0}, [67.5, 1.0], {"mode": "exact"}, True),
        ([1.0, 2.0], [1.0], {"mode": "abs", "abs": 9}, False),
        (1.0, float("nan"), {"mode": "abs", "abs": 9}, False),
        (1.0, float("inf"), {"mode": "rel", "rel": 0.1}, False),
        ([True, True], [True, False], {"mode": "exact"}, False),
        ("a statement", True, None, True),
        ("a statement", False, None, False),
        ("a statement", "another", None, False),
        (2.0, Close(2.1, rel=0.1), {"mode": "exact"}, True),
        ("2*k", Law("2*k", [2, 4], [2, 4]), None, True),
        ("2*k", Law("3*k", [2, 4], [2, 4]), None, False),
        ("2*k", Law("2*k", [2, 4], [2, 4.1], abs=0.01), None, False),
        (None, Band(4.326, "4.33–5.25"), None, True),
        (None, Band(5.2649, "4.33–5.25"), None, True),  # one unit of the last digit
        (None, Band(5.266, "4.33–5.25"), None, False),
        (None, Band(float("nan"), "4.33–5.25"), None, False),
    ],
)
def test_verdicts(printed, ours, tolerance, agrees):
    (quantity,) = compare(entry(printed, tolerance), {"value": ours})
    assert quantity.agrees is agrees


def test_a_number_that_ours_lacks_differs():
    (quantity,) = compare(entry(1.0), {"other": 1.0})
    assert (quantity.name, quantity.agrees) == ("value", False)

"""The notebooks' numbers against ours, through `scripts/reproduce.py`."""

import os

import numpy as np
import pytest

import reproduce
from lessons import digits, entries
from lessons import reproduction as r
from lessons.verdicts import Close, compare
from lightning_gd import LinearRegression

MNIST_ROOT = os.environ.get("MNIST_ROOT", "")


@pytest.fixture
def main(monkeypatch):
    """The script's main function, where no digits are at hand."""
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    return reproduce.main


def test_every_entry_has_an_experiment_and_a_notebook(main, capsys):
    found = entries.entries()
    assert len(found) == 34
    assert entries.EXPERIMENTS.keys() == {e.experiment for e in found}
    assert {n for e in found for n in e.notebooks} == entries.NOTEBOOKS.keys()
    assert main(["--list", "004"]) == 0
    printed = capsys.readouterr().out
    assert "grad_accumulation" in printed and "torch_forward" not in printed


def test_all_agree_that_need_no_mnist(main, capsys):
    assert main(["--explain"]) == 0
    printed = capsys.readouterr().out
    assert "31 of 31 experiments agree" in printed and "3 more need the full MNIST" in printed
    assert digits.FETCH in printed and "differs" not in printed
    assert "each update multiplies it by 16" in printed
    assert "The largest stable learning rate is 2/50 = 0.04" in printed
    assert "At w = 0 it is -120" in printed and "is -30" in printed
    assert "holds 3, 6, 9; with zeroing 3, 3, 3" in printed
    assert "offline digits, not those of the notebook" in printed


@pytest.mark.skipif(not MNIST_ROOT, reason="MNIST_ROOT does not name a folder with MNIST/raw")
def test_the_digits_agree_too():
    """With one of the three scalings; the command runs them all."""
    standard = {"standard": digits.notebook_digits(MNIST_ROOT)["standard"]}
    results = list(r.reproduce(["002"], standard))
    assert r.closing_line(results) == "4 of 4 experiments agree with the notebooks"


@pytest.mark.parametrize("method", ["gradients", "loss_and_gradients"])
@pytest.mark.parametrize("factor", [4, 0.5, -1])  # a sum for the mean of 4 rows, a ½, the sign
def test_a_wrong_formula_differs(main, capsys, monkeypatch, method, factor):
    right = getattr(LinearRegression, method)

    def wrong(self, x, y):
        found = right(self, x, y)
        *loss, gradients = found if isinstance(found, tuple) else (found,)
        gradients = {name: gradient * factor for name, gradient in gradients.items()}
        return (*loss, gradients) if loss else gradients

    monkeypatch.setattr(LinearRegression, method, wrong)
    assert main(["003"]) == 1
    differ = capsys.readouterr().out.partition("differ: ")[2]
    assert "torch_autograd_25" in differ
    assert "numpy_sum_gradient_11," not in differ  # NumPy knows nothing of the model


def test_missing_digits_and_wrong_arguments(main, capsys, tmp_path):
    assert main(["002"]) == 0
    assert main(["002", "--require-all"]) == 1
    assert "1 of 1 experiments agree with the notebooks; 3 more need" in capsys.readouterr().out
    assert main(["002", "--data-root", str(tmp_path)]) == 2
    assert "does not hold the four files of MNIST" in capsys.readouterr().err
    for words, message in ((["005"], "known: 000, 001"), (["002", "--download"], "--data-root")):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err


def test_lesson_numbers_are_of_the_run():
    results = list(r.reproduce(["000"]))
    law = next(found for found in results if found.entry.experiment == "divergence_law")
    law.facts["lr_max"] = 0.125
    assert "2/50 = 0.125" in r.lesson("000", results)


EXACT, NINE = {"mode": "exact"}, {"mode": "abs", "abs": 9}
ARRAYS = ["[0 0]", "[1.8 3.6]"]
VERDICTS = [  # printed, ours, tolerance, whether they agree
    (0.75, 0.75 + 5e-17, EXACT, True),  # the same float64
    (0.75, 0.7500000001, EXACT, False),
    (0.75, 0.7500000001, {"mode": "exact", "fallback_rel": 1e-6}, True),
    ("1.680", 1.6804, EXACT, True),
    ("1.680", 1.6806, EXACT, False),
    ("-45.", -45.0, EXACT, True),
    (ARRAYS, np.array([[0, 0], [1.8, 3.6000001]]), EXACT, True),
    (ARRAYS, np.array([[0, 0], [1.8, 3.7]]), EXACT, False),
    ({"0": 67.5, "2": 1.0}, [67.5, 1.0], EXACT, True),
    ([1.0, 2.0], [1.0], NINE, False),
    (1.0, float("nan"), NINE, False),
    (1.0, float("inf"), {"mode": "rel", "rel": 0.1}, False),
    ([True, True], [True, False], EXACT, False),
    ("a statement", True, None, True),
    ("a statement", "another", None, False),
    (2.0, Close(2.1, rel=0.1), EXACT, True),
    ("2*k", Close([2, 4], [2, 4], formula="2*k"), None, True),
    ("2*k", Close([2, 4], [2, 4], formula="3*k"), None, False),
    ("2*k", Close([2, 4], [2, 4.1], abs=0.01, formula="2*k"), None, False),
]


@pytest.mark.parametrize(("printed", "ours", "tolerance", "agrees"), VERDICTS)
def test_verdicts(printed, ours, tolerance, agrees):
    entry = entries.Entry("000", "e", "printed", {}, "", "", 1, {"v": printed}, tolerance, "")
    (quantity,) = compare(entry, {"v": ours})
    assert quantity.agrees is agrees
    (quantity,) = compare(entry, {"other": 1.0})  # a number that ours lacks
    assert (quantity.name, quantity.agrees) == ("v", False)


def test_bands():
    entry = entries.Entry("000", "e", "random", {}, "", "", 1, None, None, "", {"v": "4.33–5.25"})
    for ours, agrees in ((5.2649, True), (5.266, False), (float("nan"), False)):  # 5.26 is allowed
        assert [quantity.agrees for quantity in compare(entry, {"v": ours})] == [agrees]

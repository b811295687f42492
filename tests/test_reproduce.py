"""The lessons: their verdicts by `scripts/reproduce.py`, and as notebooks in a real kernel."""

import ast
import sys

import pytest

import reproduce  # isort: skip  it makes the next two known
import export
import teaching
from lightning_gd import LinearRegression

FILES = sorted(reproduce.LESSONS.glob("lesson_*.py"))


@pytest.fixture
def main(monkeypatch):
    """The script's main function, where no digits are at hand."""
    monkeypatch.setenv("MNIST_ROOT", "")
    return reproduce.main


def numbers():
    """How many numbers of each experiment were compared."""
    return {
        name: sum(check.numbers for check in teaching.CHECKS if check.experiment == name)
        for name in dict.fromkeys(check.experiment for check in teaching.CHECKS)
    }


# At least the numbers that the notebooks print, by each way to compute them.
EXPECTED = {
    "manual_forward_loss": 2, "manual_chain_rule_step": 7, "torch_forward": 3, "autograd_grad": 6,
    "torch_sgd_2_epochs": 4, "my_gradient_2_epochs": 8, "divergence_law": 24,
    "mean_gradient_closed_form": 42, "numpy_sum_gradient": 22, "torch_autograd_100": 42,
    "numpy_sum_gradient_closed_form": 42, "nn_linear_rerun_cell34": 42, "nn_linear_rate": 11,
    "numpy_sum_gradient_11": 50, "numpy_sum_gradient_11_rest": 82, "torch_autograd_11": 41,
    "torch_autograd_25": 36, "torch_autograd_rest": 52, "vector_grad_ones": 3,
    "accumulated_grad_bug": 13, "grad_accumulation": 15, "grad_zeroed": 12, "jacobian": 216,
    "detach_no_grad_random": 5, "chain_rule_scalar": 2, "numpy_sum_gradient_stale_print": 32,
    "torch_optim_sgd_10": 40, "torch_autograd_10": 20, "nn_linear_1000": 42,
    "nn_linear_1000_rate": 4,
}  # fmt: skip


def test_lessons_that_need_no_digits_agree(main, capsys):
    assert main(["000", "001", "003", "004"]) == 0
    assert "30 of 30 experiments agree with the notebooks\n" in capsys.readouterr().out
    assert numbers() == EXPECTED


@pytest.mark.slow  # 3,500 updates on 2,000 digits
def test_lesson_of_the_digits(main, capsys):
    assert main(["002"]) == 0
    printed = capsys.readouterr().out  # with the full MNIST a test of the README runs it
    assert "1 of 1 experiments agree with the notebooks; 3 more need" in printed
    assert reproduce.FETCH in printed


def plant(monkeypatch, method, factor):
    """Multiply the gradient that a method of `LinearRegression` returns."""
    right = getattr(LinearRegression, method)

    def wrong(self, x, y):
        found = right(self, x, y)
        *loss, gradients = found if isinstance(found, tuple) else (found,)
        gradients = {name: gradient * factor for name, gradient in gradients.items()}
        return (*loss, gradients) if loss else gradients

    monkeypatch.setattr(LinearRegression, method, wrong)


@pytest.mark.parametrize("method", ["gradients", "loss_and_gradients"])
@pytest.mark.parametrize("factor", [4, 0.5, -1])
def test_a_wrong_formula_differs(main, capsys, monkeypatch, method, factor):
    plant(monkeypatch, method, factor)
    assert main(["000"]) == 1
    printed = capsys.readouterr().out
    assert "manual_chain_rule_step" in printed.partition("differ: ")[2]
    assert "manual_forward_loss" not in printed.partition("differ: ")[2]
    assert "DIFFERS" in printed and "Traceback" not in printed


def test_a_sum_for_a_mean_differs_from_autograd_and_not_from_numpy(main, capsys, monkeypatch):
    plant(monkeypatch, "loss_and_gradients", 4)
    assert main(["003"]) == 1
    differ = capsys.readouterr().out.partition("differ: ")[2]
    assert "torch_autograd_25" in differ and "numpy_sum_gradient_11," not in differ


def test_missing_digits_and_wrong_arguments(main, capsys, monkeypatch, tmp_path):
    assert main(["002", "--data-root", str(tmp_path)]) == 2
    assert "does not hold the four files of MNIST" in capsys.readouterr().err
    for words, message in ((["005"], "known: 000, 001"), (["002", "--download"], "--data-root")):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert message in capsys.readouterr().err
    needing = [teaching.Check("shapes", 1, 1, "needs data")]
    monkeypatch.setattr(reproduce.runpy, "run_path", lambda path: teaching.CHECKS.extend(needing))
    assert [main(["000"]), main(["000", "--require-all"])] == [0, 1]


VERDICTS = [  # ours, printed, rounding, verdict, numbers with the same digits
    (0.75, 0.75, 0, "agrees", 1),  # in full
    (0.7500000001, 0.75, 0, "DIFFERS", 0),
    (0.7500000001, 0.75, 1e-9, "agrees", 0),
    (1.6804, "1.680", 0, "agrees", 1),  # ½ unit of the last digit
    (1.6806, "1.680", 0, "DIFFERS", 0),
    (1.6806, "1.680", 2e-4, "agrees", 0),
    ([[1.8, 3.6001]], "1.8 3.6", 0, "agrees", 2),
    ([1.0, 2.0], [1.0, 2.1], [0, 0.2], "agrees", 1),
    ([1.0, 2.0], [1.1, 2.0], [0, 0.2], "DIFFERS", 1),
    ([1.0], [1.0, 2.0], 9, "DIFFERS", 1),
    (float("nan"), "1.0", 9, "DIFFERS", 0),
    (float("inf"), 1.0, 9, "DIFFERS", 0),
    ([True, False], [True, True], 0, "DIFFERS", 1),
    (4.329, "4.33–5.25", 0, "agrees", 0),  # a band
    (5.26, "4.33–5.25", 0, "DIFFERS", 0),
    (5.26, "4.33–5.25", 0.01, "agrees", 0),
]


@pytest.mark.parametrize("ours, printed, rounding, verdict, same", VERDICTS)
def test_verdicts(monkeypatch, capsys, ours, printed, rounding, verdict, same):
    monkeypatch.setattr(teaching, "CHECKS", [])
    teaching.check("name of it", ours, printed, rounding)
    (found,) = teaching.CHECKS
    assert (found.experiment, found.verdict, found.same) == ("name", verdict, same)
    assert ("✓" in capsys.readouterr().out) is (same == found.numbers)


def test_a_lesson_with_a_difference_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(teaching, "CHECKS", [teaching.Check("this", 1, 0, "DIFFERS")])
    with pytest.raises(teaching.Differs, match="lesson 000 differs in this"):
        teaching.conclude("000")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_cells_hold_the_whole_lesson(file):
    text = file.read_text("utf-8")
    found = export.cells(text)
    code = "\n".join(body for kind, body in found if kind == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text))
    assert found[0][0] == "markdown" and found[0][1].startswith(f"# Lesson {file.stem[-3:]}")


def test_export_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    assert export.main([str(tmp_path)]) == 1
    assert "notebooks need nbformat" in capsys.readouterr().err


@pytest.mark.slow  # a kernel that imports Lightning
def test_an_exported_lesson_runs_in_a_kernel(tmp_path):
    import nbclient
    import nbformat

    assert export.main([str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ipynb"] * 5 + [".py"] * 2
    notebook = nbformat.read(tmp_path / "lesson_000.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert any("image/png" in output.get("data", {}) for output in last.outputs)
    assert "no number differs" in last.outputs[-1]["text"]

"""Pictures at the end of a fit, as PNG files and in TensorBoard."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_gd.callbacks.run_folder import boards
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import tensor_data
from lightning_gd.evaluation import evaluating
from lightning_gd.module import GradientDescentModule
from lightning_gd.settings import whole_number

MOST_ROWS = 2_000  # points of the data in the picture of a fitted line
MEASURED = ["train/loss", "test/loss"]
CHARTS = {  # of TensorBoard's custom scalars, for all runs together
    "train/loss and test/loss": ["Multiline", MEASURED],
    "measured and predicted": ["Multiline", [f"(predicted/|optimum/)?{tag}$" for tag in MEASURED]],
}


class Pictures(Callback):
    """Draws what fits the model and the data, in `<run>/pictures` and in TensorBoard.

    The loss curves with their predictions and the optimum, where these were recorded; 784 weights
    at their pixels; for digits the worst mistakes and the accuracy of each digit; for one feature
    the data and the fit after 1, 2, 4, 8, … updates. It needs a GradientDescentModule, and a
    logger, whose folder takes the pictures.

    Args:
        worst: Largest number of wrongly scored digits shown.
    """

    called_directly = True  # by `UpdatesOfStep`

    def __init__(self, worst: int = 20) -> None:
        whole_number("worst", worst, 1)
        self.worst = worst
        self.lines: list[tuple[int, Tensor]] = []  # updates made, predictions at `_at`
        self._at: Tensor | None = None  # inputs, shape [K, 1]
        self._folder: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, data = trainer.log_dir if trainer.loggers else None, tensor_data(trainer)
        own = isinstance(pl_module, GradientDescentModule) and trainer.is_global_zero
        self._folder = Path(folder) / "pictures" if folder and own else None
        self.lines, self._at = [], None
        for board in boards(trainer) if self._folder else ():
            board.add_custom_scalars({"loss": CHARTS})
        if self._folder is None or data is None:
            return
        train = data.tables["train"]
        if train.raw.shape[1:] == (1,) and train.y.ndim == 1 and train.x.is_floating_point():
            self._at = torch.linspace(float(train.x.min()), float(train.x.max()), 101)[:, None]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._at is not None and (not self.lines or trainer.global_step.bit_count() == 1):
            self.lines.append((trainer.global_step, _predict(pl_module, self._at)))

    def on_fit_end(self, trainer: Trainer, pl_module: GradientDescentModule) -> None:
        if self._folder is None:
            return
        from lightning_gd import figures  # matplotlib takes a while to import: only when drawing

        data = tensor_data(trainer)
        tables = {} if data is None else data.tables
        drawn = _of_model(figures, pl_module)
        if self._at is not None:
            self.lines.append((trainer.global_step, _predict(pl_module, self._at)))
            x, y = (rows[:MOST_ROWS] for rows in (tables["train"].x[:, 0], tables["train"].y))
            drawn["fit"] = figures.fitted_lines(x, y, self._at[:, 0], self.lines)
        if "test" in tables:
            drawn |= _of_digits(figures, pl_module, tables["test"], self.worst)
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            _publish(trainer, name, figure, self._folder / f"{name}.png")


def _publish(trainer: Trainer, name: str, figure: Any, path: Path) -> None:
    from matplotlib.image import imread

    figure.savefig(path)
    for board in boards(trainer):  # reading is faster than drawing once more
        board.add_image(f"pictures/{name}", imread(path), trainer.global_step, dataformats="HWC")


def _of_model(figures: Any, module: GradientDescentModule) -> dict[str, Any]:
    drawn, history = {}, module.curves.history
    parts = [part for part in ("train", "val", "test") if f"{part}/loss" in history]
    if parts:
        measured = {part: history[f"{part}/loss"] for part in parts}
        found = [history.get(f"predicted/{part}/loss") for part in parts]
        predicted = [curve for curve in found if curve is not None]
        _, best = history.get("optimum/train/loss", ([], [None]))
        drawn["loss"] = figures.loss_curves(measured, predicted, best[0])
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.numel() == 784:
        drawn["weights"] = figures.weight_picture(weight.detach().float().cpu().numpy())
    return drawn


def _of_digits(
    figures: Any, module: GradientDescentModule, table: Table, worst: int
) -> dict[str, Any]:
    y, labels = table.y, table.labels
    if labels is None or table.raw.shape[1:] != (784,) or not (y.abs() == 1).all():
        return {}
    scores, odd = _predict(module, table.x), float((y > 0).float().mean())
    right = ((scores > 0) == (y > 0)).float()
    by_digit = [float(right[labels == digit].mean()) for digit in range(10)]
    overall, majority = float(right.mean()), max(odd, 1 - odd)
    return {
        "wrong_digits": figures.wrong_digits(table.raw, y, scores, labels, worst),
        "accuracy_by_digit": figures.accuracy_by_digit(by_digit, overall, majority),
    }


def _predict(module: LightningModule, x: Tensor) -> Tensor:
    """Return the predictions in evaluation mode, on the CPU."""
    with evaluating(module):
        return module(x.to(next(module.parameters()))).float().cpu()

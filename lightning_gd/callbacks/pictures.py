"""Pictures at the end of a fit, in TensorBoard and as PNG files."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lightning_gd.refusals import whole_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_KEPT = 4_000  # points of a curve, several for each dot of a picture
MOST_ROWS = 2_000  # points of the data in the picture of a fitted line
PREDICTED, OPTIMUM = "predicted/", "optimum/"  # before `train/loss`, `test/loss`


class CurveMemory(Logger):
    """Keeps the curves that a run logs: in `curves[tag]` the points `(update, value)`.

    Args:
        most: Points kept of a curve; a longer one loses every second. Null keeps all.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most = most
        self.curves: dict[str, list[tuple[int, float]]] = {}

    name = version = save_dir = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def log_points(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Keep `(update, {tag: value})`."""
        for step, values in points:
            for tag, value in values.items():
                curve = self.curves.setdefault(tag, [])
                curve.append((step, value))
                if self.most is not None and len(curve) > self.most:
                    del curve[1::2]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep single values."""
        self.log_points([(step or 0, {tag: float(value) for tag, value in metrics.items()})])

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: only curves are kept."""

    def __getitem__(self, tag: str) -> tuple[list[int], list[float]]:
        """Updates and values of a curve; both empty where there is none."""
        points = self.curves.get(tag, [])
        return [step for step, _ in points], [value for _, value in points]


def shared_chart(*tags: str) -> dict[str, dict[str, list]]:
    """A layout for TensorBoard's custom scalars: `tags`, of every run shown, in one chart."""
    predicted = [f"({PREDICTED}|{OPTIMUM})?{tag}$" for tag in tags]
    return {
        "loss": {
            " and ".join(tags): ["Multiline", list(tags)],
            "measured and predicted": ["Multiline", predicted],
        }
    }


class Pictures(Callback):
    """Draws what fits the model and the data, on the first process.

    In `<run>/pictures` and TensorBoard: the loss curves, with the predicted ones and the optimum
    where they were logged; 784 weights in their places; for digits the worst mistakes and the
    accuracy of each digit; for one feature the data and the fit after 1, 2, 4, 8, … updates.
    A run without a logger has no folder and gets no pictures.

    Args:
        worst: Wrongly scored digits shown at most.

    Raises:
        ValueError: If `worst` is below 1.
    """

    def __init__(self, worst: int = 20) -> None:
        whole_number("worst", worst, 1)
        self.worst = worst
        self.every_n_updates = 0  # blocks of updates end where this says, see BlockSchedule
        self._folder: Path | None = None
        self._memory = CurveMemory(MOST_KEPT)
        self._lines: list[tuple[int, Tensor]] = []
        self._at: Tensor | None = None  # where the lines are evaluated, shape [K, 1]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to what is logged, and ask for one chart of the train and the test loss."""
        folder = trainer.log_dir if stage == "fit" and trainer.loggers else None
        self._folder = None if folder is None else Path(folder) / "pictures"
        if self._folder is None:
            return
        self._memory, self._lines, self._at = CurveMemory(MOST_KEPT), [], None
        self.every_n_updates = 0
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars(shared_chart("train/loss", "test/loss"))
        trainer.loggers = [*trainer.loggers, self._memory]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The line before the first update, where the data have one feature."""
        table = _tables(trainer).get("train")
        if self._folder is None or table is None or table.raw.shape[1:] != (1,):
            return
        self._at = torch.linspace(float(table.x.min()), float(table.x.max()), 101)[:, None]
        self._keep_line(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The line after 1, 2, 4, 8, … updates."""
        if self.every_n_updates and trainer.global_step >= self.every_n_updates:
            self._keep_line(trainer, pl_module)

    def _keep_line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._at is not None
        self._lines.append((trainer.global_step, _predict(pl_module, self._at)))
        self.every_n_updates = 1 << trainer.global_step.bit_length()  # the next power of two

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._folder is None:
            return
        trainer.loggers = [logger for logger in trainer.loggers if logger is not self._memory]
        if not trainer.is_global_zero:
            return
        if self._at is not None and self._lines[-1][0] != trainer.global_step:
            self._keep_line(trainer, pl_module)
        for name, figure in self.figures(_tables(trainer), pl_module).items():
            self._publish(figure, name, trainer)

    def figures(self, tables: dict[str, Any], pl_module: LightningModule) -> dict[str, Figure]:
        """The pictures that fit this model and these data, by name."""
        from lightning_gd import figures  # matplotlib takes a while to import: only when drawing

        drawn = {}
        parts = [part for part in ("train", "val", "test") if self._memory[f"{part}/loss"][0]]
        if parts:
            measured = {part: self._memory[f"{part}/loss"] for part in parts}
            predicted = {part: self._memory[f"{PREDICTED}{part}/loss"] for part in parts}
            predicted = {part: curve for part, curve in predicted.items() if curve[0]}
            optimum = self._memory[f"{OPTIMUM}train/loss"][1]
            drawn["loss"] = figures.loss_curves(
                measured, predicted, optimum[-1] if optimum else None
            )
        weight = getattr(pl_module, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() == 784:
            drawn["weights"] = figures.weight_picture(weight.detach().cpu().numpy())
        if self._at is not None:
            train = tables["train"]
            drawn["fit"] = figures.fitted_lines(
                train.x[:MOST_ROWS, 0].numpy(),
                train.y[:MOST_ROWS].numpy(),
                self._at[:, 0].numpy(),
                [(updates, line.numpy()) for updates, line in self._lines],
            )
        return {**drawn, **self._digits(tables.get("test"), pl_module)}

    def _digits(self, table: Any, pl_module: LightningModule) -> dict[str, Figure]:
        from lightning_gd import figures

        if table is None or table.raw.shape[1:] != (784,) or not (table.y.abs() == 1).all():
            return {}
        scores, y, labels = _predict(pl_module, table.x), table.y, table.labels
        drawn = {
            "wrong_digits": figures.wrong_digits(
                table.raw.numpy(), y.numpy(), scores.numpy(), labels, self.worst
            )
        }
        if labels is not None:
            right, odd = ((scores > 0) == (y > 0)).float(), (y > 0).float().mean()
            drawn["accuracy_by_digit"] = figures.accuracy_by_digit(
                [float(right[labels == digit].mean()) for digit in range(10)],
                float(right.mean()),
                float(torch.maximum(odd, 1 - odd)),
            )
        return drawn

    def _publish(self, figure: Figure, name: str, trainer: Trainer) -> None:
        """Render once, for the file and for TensorBoard; `add_figure` would render once more."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        (self._folder / f"{name}.png").write_bytes(buffer.getvalue())
        width, height = figure.canvas.get_width_height()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                size = (height, width)
                _add_png(logger, f"pictures/{name}", buffer.getvalue(), size, trainer.global_step)


def _tables(trainer: Trainer) -> dict[str, Any]:
    data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return getattr(data, "tables", {})


@torch.no_grad()
def _predict(module: LightningModule, x: Tensor) -> Tensor:
    """Predictions on the CPU, without dropout and the like."""
    training, like = module.training, next(module.parameters())
    try:
        return module.eval()(x.to(like)).float().cpu()
    finally:
        module.train(training)


def _add_png(
    logger: TensorBoardLogger, tag: str, png: bytes, size: tuple[int, int], step: int
) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    image = Summary.Image(height=size[0], width=size[1], colorspace=4, encoded_image_string=png)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    logger.experiment._get_file_writer().add_summary(summary, step)

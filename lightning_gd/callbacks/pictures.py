"""Pictures at the end of a fit, as PNG files and in TensorBoard."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.optim import Optimizer

from lightning_gd.callbacks.run_folder import boards, description
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import TensorDataModule, tensor_data
from lightning_gd.evaluation import evaluating
from lightning_gd.files import whole
from lightning_gd.leastsquares import LeastSquares
from lightning_gd.loggers import run_folder
from lightning_gd.module import GradientDescentModule
from lightning_gd.settings import DivergenceError, whole_number
from lightning_gd.surface import WeightPath

MOST_ROWS = 2_000  # points of the data in the picture of a fitted line
MOST_NUMBERS = 2**16  # trained numbers of a model whose path is kept
MEASURED = ["train/loss", "test/loss"]
CHARTS = {  # of TensorBoard's custom scalars, for all runs together
    "train/loss and test/loss": ["Multiline", MEASURED],
    "measured and predicted": ["Multiline", [f"(predicted/|optimum/)?{tag}$" for tag in MEASURED]],
}


class Pictures(Callback):
    """Draws what fits the model and the data, in `<run>/pictures` and in TensorBoard.

    The loss curves with their predictions and the optimum, where these were recorded; the surface:
    the path of the run over contours of the training loss; 784 weights at their pixels; for digits
    the worst mistakes and the accuracy of each digit; for one feature the data and the fit after
    1, 2, 4, 8, … updates. It needs a GradientDescentModule, and a logger, whose folder takes the
    pictures. For a run on one process that diverges, loss and surface are drawn.

    Args:
        worst: Largest number of wrongly scored digits shown.
        surface: `auto` draws the surface of one or two trained numbers, `true` that of up to
            65,536, in the plane in which the path moved most; both for a TensorDataModule.
        animation: Also write a GIF of the moving path, the loss and the fit.
    """

    reads_gradients = False  # only weights

    def __init__(
        self, worst: int = 20, surface: bool | Literal["auto"] = "auto", animation: bool = False
    ) -> None:
        whole_number("worst", worst, 1)
        if surface not in (True, False, "auto") or animation and not surface:
            rest = "" if animation else " or False"
            raise ValueError(f"surface={surface!r} must be 'auto' or True{rest} ({animation=})")
        self.worst, self.surface, self.animation = worst, animation or surface, animation
        self.lines: list[tuple[int, Tensor]] = []  # updates made, predictions at `_at`
        self.path: WeightPath | None = None
        self._at: Tensor | None = None  # inputs, shape [K, 1]
        self._folder: Path | None = None
        self._resumed: tuple[list[int], list[Tensor]] = [], []  # of the path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.lines, self._resumed = [], ([], [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, data = run_folder(trainer), tensor_data(trainer)
        self.path, self._at, self._folder = None, None, None
        if not folder or not isinstance(pl_module, GradientDescentModule):
            return
        path = WeightPath(pl_module)
        has_surface = self._has_surface(path.size, data)  # on every process: it may raise
        if not trainer.is_global_zero:
            return
        updates, weights = self._resumed
        if {len(w) for w in weights} <= {path.size}:  # else another part of the model is trained
            path.updates, path.weights = updates, [w.to(pl_module.device) for w in weights]
        self._folder, self.path = folder / "pictures", path if has_surface else None
        for board in boards(trainer):
            board.add_custom_scalars({"loss": CHARTS})
            board.add_text("run", description(pl_module))
        if data is None:
            return
        x, y = data.tables["train"].sample()
        if x.shape[1:] == (1,) and y.ndim == 1 and x.is_floating_point():
            self._at = torch.linspace(float(x.min()), float(x.max()), 101)[:, None]

    def _has_surface(self, size: int, data: TensorDataModule | None) -> bool:
        """Tell whether the surface is drawn; raise ValueError if it was asked for in vain."""
        if self.surface == "auto":
            return data is not None and size <= 2
        if self.surface and (data is None or size > MOST_NUMBERS):
            raise ValueError(
                f"surface=True needs a TensorDataModule and at most {MOST_NUMBERS:,} trained "
                f"numbers (got {size:,}): set --pictures.surface auto"
            )
        return bool(self.surface)

    def state_dict(self) -> dict[str, Any]:
        """Keep what was seen of the run, but no path of more than 65,536 numbers in all."""
        path = self.path
        if path is None or path.size * len(path.updates) > MOST_NUMBERS:
            return {"lines": self.lines, "path": ([], [])}
        return {"lines": self.lines, "path": (path.updates, path.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines, self._resumed = state_dict["lines"], state_dict["path"]

    def looks_at(self, step: int) -> bool:
        """Tell whether a line or a point of the path belongs to this update."""
        return self.path is not None or self._at is not None and step.bit_count() == 1

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._at is not None and (not self.lines or trainer.global_step.bit_count() == 1):
            self.lines.append((trainer.global_step, _predict(pl_module, self._at)))
        if self.path is not None:
            self.path.add(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Draw a run that diverges; of several processes the others would not wait for it."""
        if isinstance(exception, DivergenceError) and trainer.world_size == 1 and self._folder:
            from lightning_gd import figures

            drawn = _of_losses(figures, trainer, pl_module)
            self._save(trainer, self._folder, drawn | self._of_path(trainer, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: GradientDescentModule) -> None:
        if self._folder is None:
            return
        from lightning_gd import figures  # matplotlib takes a while to import: only when drawing

        data = tensor_data(trainer)
        tables = {} if data is None else data.tables
        drawn = _of_losses(figures, trainer, pl_module) | _of_weight(figures, pl_module)
        if self._at is not None:
            self.lines.append((trainer.global_step, _predict(pl_module, self._at)))
            drawn["fit"] = figures.fitted_lines(*_points(tables), self._at[:, 0], self.lines)
        if "test" in tables:
            drawn |= _of_digits(figures, pl_module, tables["test"], self.worst)
        self._save(trainer, self._folder, drawn | self._of_path(trainer, pl_module))

    def _of_path(self, trainer: Trainer, module: GradientDescentModule) -> dict[str, Any]:
        """Draw the surface, and write the animation."""
        data, path, folder = tensor_data(trainer), self.path, self._folder
        if data is None or path is None or folder is None:
            return {}
        from lightning_gd import surface_figures

        path.add(trainer.global_step, is_last=True)
        squares = LeastSquares.of(trainer, module) is not None
        surface = path.surface(data.tables["train"], quadratic=squares)
        if surface is None:
            return {}
        if self.animation:
            file, fit = folder / "animation.gif", None
            if self._at is not None:
                lines = path.predictions(surface.points, self._at)
                fit = *_points(data.tables), self._at[:, 0], lines
            folder.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                surface_figures.animate(partial, surface, path.names, fit)
            _publish(trainer, file)
        return {"surface": surface_figures.surface_figure(surface, path.names)}

    def _save(self, trainer: Trainer, folder: Path, drawn: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            with whole(folder / f"{name}.png") as partial:
                figure.savefig(partial, format="png")
            _publish(trainer, folder / f"{name}.png")


def _publish(trainer: Trainer, file: Path) -> None:
    """Show a picture in TensorBoard as it is in the file, so that a GIF moves."""
    from PIL import Image

    with Image.open(file) as picture:
        size = {"width": picture.width, "height": picture.height, "colorspace": 4}
    image = Summary.Image(encoded_image_string=file.read_bytes(), **size)
    summary = Summary(value=[Summary.Value(tag=f"pictures/{file.stem}", image=image)])
    for board in boards(trainer):
        board.file_writer.add_summary(summary, trainer.global_step)


def _points(tables: dict[str, Table]) -> tuple[Tensor, Tensor]:
    """Return the only feature and the target of some training rows, shape [N] each."""
    x, y = tables["train"].sample(MOST_ROWS)
    return x[:, 0], y


def _of_losses(figures: Any, trainer: Any, module: GradientDescentModule) -> dict[str, Any]:
    history = module.curves.history
    parts = [part for part in ("train", "val", "test") if f"{part}/loss" in history]
    if not parts:
        return {}
    measured = {part: history[f"{part}/loss"] for part in parts}
    found = [history.get(f"predicted/{part}/loss") for part in parts]
    predicted = [curve for curve in found if curve is not None]
    _, best = history.get("optimum/train/loss", ([], [None]))
    data, lr = type(trainer.datamodule or trainer.train_dataloader).__name__, module.hparams["lr"]
    title = f"{type(module).__name__} on {data}, lr {lr:.4g}"
    return {"loss": figures.loss_curves(measured, predicted, best[0], title)}


def _of_weight(figures: Any, module: GradientDescentModule) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.numel() != 784:
        return {}
    return {"weights": figures.weight_picture(weight.detach().float().cpu().numpy())}


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

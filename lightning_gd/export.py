"""A trained model as one file for other programs: ONNX, or a program of `torch.export`."""

import copy
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lightning_gd.data.table import TableData
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.evaluation import form
from lightning_gd.files import whole

ROWS = 32  # on which the file is compared with the model
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that write and run ONNX


class FromRaw(nn.Module):
    """The scaling of the data, and the model behind it."""

    def __init__(self, model: nn.Module, scaled: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.scaled = model, scaled

    def forward(self, raw: Tensor) -> Tensor:
        x = self.scaled(raw)
        return self.model(x.float() if x.is_floating_point() else x)


def check_target(to: str | None, overwrite: bool) -> None:
    """Raise ValueError or OSError, naming what is missing, for a file that cannot be written."""
    path = Path(to or "")
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--to {to or 'is missing: it'} must be a file that ends in .onnx or .pt2")
    missing = [name for name in PACKAGES if path.suffix == ".onnx" and find_spec(name) is None]
    if missing:
        raise ValueError(f"--to {to} needs: pip install {' '.join(missing)} (or choose .pt2)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--to {to}: there is no folder {path.parent}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"--to {to} exists already: choose another, or --overwrite true")


def export(model: LightningModule, data: LightningDataModule, path: Path) -> str:
    """Write a model, in float32, as a graph from raw rows to predictions; return a line about it.

    The scaling of a `TensorDataModule` is part of the graph: bytes of pixels go in, or columns of
    a table in float64. The number of rows is free. The file is written whole or not at all, once
    its graph has given the predictions of the model.

    Raises:
        ValueError: If the model cannot be traced, or does not return one tensor.
        ArithmeticError: If the graph predicts something else than the model.
    """
    rows, scaled = _raw_rows(data)
    copied, name = copy.deepcopy(model).float().cpu(), type(model).__name__
    graph = FromRaw(copied, scaled).eval().requires_grad_(False)  # nor do predictions need one
    with torch.no_grad():
        expected = graph(rows)
    if not isinstance(expected, Tensor):
        raise ValueError(f"{name}.forward must return a tensor; got {type(expected).__name__}")
    try:
        content = _content(graph, rows[[0, -1]], path.suffix)  # one row would stay one
    except RuntimeError as error:
        reason = str(error.__cause__ or error).splitlines()[0][:300]
        raise ValueError(f"{name} cannot be exported: {reason}") from error
    found = _run(content, path.suffix, rows)
    apart, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not apart <= 1e-4 * size:  # 1,000 roundings of float32; NaN is refused, too
        raise ArithmeticError(f"the graph is {apart:.2g} away from predictions up to {size:.2g}")
    with whole(path) as partial:
        partial.write_bytes(content)
    raw, out = (f"{str(t.dtype).removeprefix('torch.')} {form(t)}" for t in (rows, expected))
    columns = f" ({', '.join(data.features)})" if isinstance(data, TableData) else ""
    return f"{path}: {raw}{columns} to {out}, {apart:.2g} from the model's on {len(rows)} rows"


def _raw_rows(data: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return some rows before they are scaled, and what scales them."""
    if isinstance(data, TensorDataModule):
        data.tables["train"].use(torch.float32)
        return data.raw_rows("train", ROWS), data.scaled
    batch = next(iter(data.train_dataloader()))
    return batch[0] if isinstance(batch, (tuple, list)) else batch, lambda x: x


def _content(graph: nn.Module, rows: Tensor, ending: str) -> bytes:
    """Return the content of the file; strict, so that `len(x)` does not fix the number of rows."""
    free, file = {0: torch.export.Dim("rows")}, io.BytesIO()
    program = torch.export.export(graph, (rows,), dynamic_shapes=(free,), strict=True)
    if ending == ".pt2":
        torch.export.save(program, file)
        return file.getvalue()
    names: Any = {"input_names": ["raw"], "output_names": ["prediction"], "verbose": False}
    made: Any = torch.onnx.export(program, dynamo=True, dynamic_shapes=({0: "rows"},), **names)
    return made.model_proto.SerializeToString()


def _run(content: bytes, ending: str, rows: Tensor) -> Tensor:
    """Return what the graph predicts for raw rows."""
    if ending == ".pt2":
        return torch.export.load(io.BytesIO(content)).module()(rows).detach()
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    return torch.from_numpy(session.run(None, {"raw": rows.numpy()})[0])

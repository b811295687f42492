"""Points written in the configuration."""

import torch

from lightning_gd.data.tensors import Table, TensorDataModule


class PointsData(TensorDataModule):
    """A few points for linear regression, used for training and test; y = 2x by default.

    Args:
        x: Inputs: one number per point, or one list of features per point.
        y: Targets: one number per point.
        **kwargs: Those of `TensorDataModule`.

    Raises:
        ValueError: If the numbers of inputs and targets differ, or one is not finite.
    """

    def __init__(
        self,
        x: list[float] | list[list[float]] | None = None,
        y: list[float] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        x = [1.0, 2.0, 3.0, 4.0] if x is None else x
        y = [2.0, 4.0, 6.0, 8.0] if y is None else y
        self.points = _table(x, y)
        self.num_features = self.points.raw.shape[1]

    def load(self) -> dict[str, Table]:
        """Return the same points to train and to test on."""
        return {"train": self.points, "test": self.points}


def _table(x: list, y: list) -> Table:
    rows = [row if isinstance(row, list) else [row] for row in x]
    widths = sorted({len(row) for row in rows})
    if len(x) != len(y) or len(widths) != 1 or widths == [0]:
        raise ValueError(
            f"x and y need one entry per point, all of one form; got {len(x)} in x with "
            f"{widths} features and {len(y)} in y"
        )
    if any(isinstance(target, list) for target in y):
        raise ValueError(f"y needs one number per point; got {y}")
    table = Table(torch.tensor(rows) * 1.0, torch.tensor(y) * 1.0)
    for name, values, given in (("x", table.raw, x), ("y", table.y, y)):
        if not values.isfinite().all():
            raise ValueError(f"{name} must hold finite numbers of {values.dtype}; got {given}")
    return table

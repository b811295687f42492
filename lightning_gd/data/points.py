"""Points written in the configuration."""

import torch

from lightning_gd.data.tensors import Table, TensorDataModule


class PointsData(TensorDataModule):
    """A few points for linear regression, used for training and test; y = 2x by default.

    Args:
        x: Inputs: one number per point, or one list of features per point.
        y: Targets: one number per point.
        **kwargs: Those of `TensorDataModule`.
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
        try:
            inputs, targets = torch.tensor(x) * 1.0, torch.tensor(y) * 1.0
        except (TypeError, ValueError) as error:
            raise ValueError(f"x and y need entries of one form: {error}") from error
        self.points = Table(inputs[:, None] if inputs.ndim == 1 else inputs, targets)
        self.num_features = self.points.raw.shape[1]

    def load(self) -> dict[str, Table]:
        return {"train": self.points, "test": self.points}

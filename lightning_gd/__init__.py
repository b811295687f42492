"""Gradient descent with hand-derived gradients in PyTorch Lightning.

Names are imported when first used, so that `--help` need not wait for Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gd.batch import Batch
    from lightning_gd.data.mnist import MNISTParityData
    from lightning_gd.data.points import PointsData
    from lightning_gd.data.table import TableData
    from lightning_gd.data.tensors import TensorDataModule
    from lightning_gd.loading import load
    from lightning_gd.models.linear import LinearRegression
    from lightning_gd.models.logistic import LogisticParity
    from lightning_gd.models.mlp import ParityMLP
    from lightning_gd.models.parity import ParityRegressor
    from lightning_gd.models.ridge import RidgeRegression
    from lightning_gd.module import GradientDescentModule

_HOMES = {
    "Batch": "batch",
    "GradientDescentModule": "module",
    "LinearRegression": "models.linear",
    "LogisticParity": "models.logistic",
    "MNISTParityData": "data.mnist",
    "ParityMLP": "models.mlp",
    "ParityRegressor": "models.parity",
    "PointsData": "data.points",
    "RidgeRegression": "models.ridge",
    "TableData": "data.table",
    "TensorDataModule": "data.tensors",
    "load": "loading",
}

__all__ = [
    "Batch",
    "GradientDescentModule",
    "LinearRegression",
    "LogisticParity",
    "MNISTParityData",
    "ParityMLP",
    "ParityRegressor",
    "PointsData",
    "RidgeRegression",
    "TableData",
    "TensorDataModule",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_gd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lightning_gd.{_HOMES[name]}"), name)

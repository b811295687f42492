"""Is a gradient that of its loss? Against autograd and differences, with the mistake by name."""

from lightning_gd.gradcheck.check import check_gradients
from lightning_gd.gradcheck.delivered import check_delivered
from lightning_gd.gradcheck.function import check_function
from lightning_gd.gradcheck.objective import check_objective
from lightning_gd.gradcheck.report import (
    FunctionReport,
    GradientError,
    GradientReport,
    ParameterReport,
)

__all__ = [
    "FunctionReport",
    "GradientError",
    "GradientReport",
    "ParameterReport",
    "check_delivered",
    "check_function",
    "check_gradients",
    "check_objective",
]

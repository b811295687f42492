"""Is a formula the gradient of its loss? Against autograd and differences, by name."""

from lightning_gd.gradcheck.check import check_gradients, check_reduced
from lightning_gd.gradcheck.report import GradientError, GradientReport, ParameterReport

__all__ = [
    "GradientError",
    "GradientReport",
    "ParameterReport",
    "check_gradients",
    "check_reduced",
]

"""Is a gradient that of its loss? Against autograd and differences, with the mistake by name."""

from lightning_gd.gradcheck.check import check_gradients
from lightning_gd.gradcheck.delivered import check_delivered
from lightning_gd.gradcheck.report import GradientError, GradientReport, ParameterReport

__all__ = [
    "GradientError",
    "GradientReport",
    "ParameterReport",
    "check_delivered",
    "check_gradients",
]

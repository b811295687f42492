"""Checks the gradient and the Hessian of an objective of gradient boosting."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_gd.gradcheck.delivered import SHAKES, compared, explained
from lightning_gd.gradcheck.diagnosis import unfit
from lightning_gd.gradcheck.precision import eager
from lightning_gd.gradcheck.randomness import same_randomness
from lightning_gd.gradcheck.report import FunctionReport, GradientReport, ParameterReport
from lightning_gd.gradcheck.twin import shaken


def check_objective(
    objective: Callable[[Any, Any], Any], prediction: Any, target: Any, loss: Any
) -> FunctionReport:
    """Check the gradient and the diagonal of the Hessian that an objective returns for each row.

    The truth are derivatives of `loss` in float64, with the bounds of `check_function`.

    Args:
        objective: `objective(prediction, target)` returns both in the shape of the predictions, as
            `train` of XGBoost and LightGBM has it; the scikit-learn interfaces swap the two.
        prediction: Example predictions [N] or [N, K], an array or a tensor as `objective` wants it.
        target: Targets of the same kind.
        loss: `loss(prediction, target)` of tensors, the sum over rows that do not interact.
    """
    points, labels = torch.as_tensor(prediction).double(), torch.as_tensor(target)
    found = [torch.as_tensor(values) for values in objective(prediction, target)]
    dtypes = found[0].dtype, torch.as_tensor(prediction).dtype
    eps, random = max(torch.finfo(d).eps for d in dtypes), torch.Generator().manual_seed(0)
    with same_randomness(), eager(torch.get_default_dtype()):
        shakes = [points, *(shaken(points, eps, random) for _ in range(SHAKES))]
        near = [_derivatives(loss, values, labels) for values in shakes]
    reports = []
    for k, name in enumerate(("gradient", "hessian")):
        bound = explained([pair[k] for pair in near], eps)
        if words := unfit(found[k], near[0][k].to(found[k])):
            reports.append(ParameterReport(name, diagnosis=words))
        else:
            reports.append(compared(name, found[k], near[0][k], bound, len(points)))
    return FunctionReport({"as given": GradientReport(tuple(reports))})


def _derivatives(loss: Any, prediction: Tensor, target: Tensor) -> list[Tensor]:
    """Return the gradient, and the second derivative by each prediction."""
    hessian = torch.func.hessian(loss)(prediction, target)
    hessian = hessian.reshape(2 * [prediction.numel()]).diagonal().view_as(prediction)
    return [torch.func.grad(loss)(prediction, target), hessian]

"""Jacobians sample by sample, against torch's own ways."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.fitting import Prepared
from benchmarks.harness import Row
from benchmarks.team import Job, Run, Side
from lessons.derivatives import per_sample_jacobian

SAMPLES = 1000


def rows(quick: bool) -> list[Row]:
    """The rows of Jacobians."""
    plain, vectorized = (partial(whole_jacobian, vectorize=v) for v in (False, True))
    sides = (
        Side("per_sample_jacobian", partial(jacobian, rows=SAMPLES)),
        Side("functional.jacobian", plain, faster=100),
        Side("the same, vectorize=True", vectorized),
        Side("vmap of jacrev", mapped_jacobian),
    )
    sizes = (10**4, 10**3) if quick else (10**5, 10**4, 10**3)
    growing = tuple(
        Side(f"{n:,} samples", partial(jacobian, rows=n), at_most=1.5 if i else None)
        for i, n in enumerate(sizes)
    )
    work = f"Jacobian of each of {SAMPLES:,} samples, 3 → 3"
    return [
        Row("jacobian", work, sides, "µs/sample"),
        Row("jacobian-linear", "Jacobian of each of more and more samples", growing, "µs/sample"),
    ]


def columns(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The notebook's x = y = z = 0 … 9, over and over, so that all sizes agree."""
    column = torch.arange(rows) % 10.0
    return column, column.clone(), column.clone()


def cubes(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The notebook's B = (x³ − y², y² + z², z³ − x²), shape [N, 3]."""
    return torch.stack([x**3 - y**2, y**2 + z**2, z**3 - x**2], dim=-1)


def jacobian(job: Job, rows: int) -> Prepared:
    """Ours; the Jacobians of the last thousand samples must agree."""
    inputs = columns(rows)
    return lambda: Run(per_sample_jacobian(cubes, *inputs)[-SAMPLES:].double().numpy(), rows)


def whole_jacobian(job: Job, vectorize: bool) -> Prepared:
    """The Jacobian [N, 3, N, 3], of which the diagonal is wanted."""
    x, n = torch.stack(columns(SAMPLES), dim=1), torch.arange(SAMPLES)

    def run() -> Run:
        whole = torch.autograd.functional.jacobian(
            lambda x: cubes(*x.unbind(1)), x, vectorize=vectorize
        )
        assert isinstance(whole, Tensor)
        return Run(whole[n, :, n, :].double().numpy(), SAMPLES)

    return run


def mapped_jacobian(job: Job) -> Prepared:
    """The Jacobian of one sample, mapped over the batch."""
    x = torch.stack(columns(SAMPLES), dim=1)
    each = torch.func.vmap(torch.func.jacrev(lambda x: cubes(*x.unbind())))
    return lambda: Run(each(x).double().numpy(), SAMPLES)

"""The path of a run, and the loss around it in the plane in which the path moved most."""

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.func import functional_call

from lightning_gd.batch import Batch, as_batch
from lightning_gd.data.tables import Table
from lightning_gd.evaluation import evaluating, losses_at
from lightning_gd.moments import Moments

BITS = 6  # the path has the first 2⁶ updates, then every 3rd up to 2⁷, every 5th up to 2⁸, …
CLIMB = 100.0  # times the first loss: up to there a run that diverges is drawn
STEP, NEAR = 0.1, 2.0  # of differences; how far a lowest point may be: times the size of the path
MOST_ROWS, MOST_PRODUCTS, TOGETHER = 2048, 2**22, 64  # of a loss that is not least squares

Loss = Callable[[Tensor], Tensor]  # from weights of shape [K, P] to losses of shape [K]


class WeightPath:
    """The trained weights of a module after some of its updates.

    Attributes:
        updates: Numbers of updates made.
        weights: All trained numbers after these, shape [P] each.
        size: P.
        names: Of the first two numbers.
    """

    def __init__(self, module: LightningModule) -> None:
        self.updates: list[int] = []
        self.weights: list[Tensor] = []
        self._module = module
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self._trained.values())
        sizes = {name: p.numel() for name, p in self._trained.items()}
        names = [[name] if n == 1 else [f"{name}[0]", f"{name}[1]"] for name, n in sizes.items()]
        self.names = sum(names, [])[:2]

    def add(self, update: int, *, is_last: bool = False) -> None:
        """Keep a copy of the present weights, of fewer and fewer of the later updates.

        Odd distances show a path that swings to and fro at each update as it is.
        """
        distance = 1 << max(0, update.bit_length() - BITS)
        if update % (distance + (distance > 1)) and not is_last:
            return
        self.updates.append(update)
        self.weights.append(torch.cat([p.detach().reshape(-1) for p in self._trained.values()]))

    def surface(self, table: Table, quadratic: bool) -> "Surface | None":
        """Return the loss of a table around the path; None if the weights did not move.

        A quadratic loss is computed from the moments of the rows, exactly; another one on at most
        2,048 rows, evenly spaced.
        """
        most = max(TOGETHER, min(MOST_ROWS, MOST_PRODUCTS // self.size))
        if quadratic:
            loss = partial(_from_moments, table.moments())
        else:
            x, y = table.sample()
            apart = -(-len(y) // most)
            rows = x[::apart], y[::apart]
            loss = partial(self._from_rows, as_batch(rows).to(self._module.device))
        weights = torch.stack(self.weights).double().cpu()
        with isolate_rng():
            finite = loss(weights).isfinite()
            updates, weights = torch.tensor(self.updates)[finite], weights[finite]
            moved = len(weights) > 1 and bool((weights != weights[0]).any())
            return Surface(loss, updates, weights, quadratic) if moved else None

    def _from_rows(self, batch: Batch, weights: Tensor) -> Tensor:
        parts = map(self._named, weights.split(TOGETHER))
        return torch.cat([losses_at(self._module, batch, w).double().cpu() for w in parts])

    def predictions(self, weights: Tensor, x: Tensor) -> list[Tensor]:
        """Return the predictions for x at K weights, shape [K, P], on the CPU."""
        named, x = self._named(weights), x.to(next(self._module.parameters()))
        each = ({name: w[k] for name, w in named.items()} for k in range(len(weights)))
        with evaluating(self._module):
            return [functional_call(self._module, w, (x,)).float().cpu() for w in each]

    def _named(self, weights: Tensor) -> dict[str, Tensor]:
        """Return weights of shape [K, P] by parameter, shape [K, ...] each."""
        parts = weights.split([p.numel() for p in self._trained.values()], dim=1)
        pairs = zip(self._trained.items(), parts, strict=True)
        return {name: part.reshape(-1, *p.shape).to(p) for (name, p), part in pairs}


def _from_moments(moments: Moments, weights: Tensor) -> Tensor:
    return moments.loss(weights[:, : moments.size], weights[:, moments.size :].sum(1))


class Surface:
    """The loss at weights θ = origin + a·axes, a plane with coordinates a of shape [d].

    One or two trained numbers are themselves the coordinates. Of more, the axes are the two
    principal components of the path, and the plane passes through the last point of the path.

    Args:
        loss: The loss.
        updates: Updates made at the points of the path, shape [K], ascending.
        weights: The points, shape [K, P], with finite losses; at least two differ.
        quadratic: Whether the loss is; then differences give its lowest point.

    Attributes:
        shown: Number of points, from the first on, that are drawn: a run that diverges is cut.
        points: Their weights, shape [shown, P].
        path: Their coordinates, shape [shown, d].
        losses: Their losses, which may lie outside of the plane, shape [shown].
        is_whole: The plane is the space of all weights.
        share: The part of Σ ‖θ − mean‖² over these points that lies in the plane.
        curvatures, directions: Eigenvalues of the Hessian of the loss in the plane at the last
            point, ascending, shape [d], and its eigenvectors as columns, shape [d, d].
        best: The lowest point of the plane, shape [d]; None if it is not known or far away.
    """

    def __init__(self, loss: Loss, updates: Tensor, weights: Tensor, quadratic: bool) -> None:
        losses, size = loss(weights), weights.shape[1]
        low = (losses <= CLIMB * losses[0]).nonzero()
        self.shown = max(int(low[-1]) + 1, min(3, len(losses)))
        self.updates, self.losses, self._loss = updates, losses[: self.shown], loss
        self.points = points = weights[: self.shown]
        self.is_whole = size <= 2
        self.origin = torch.zeros(size).double() if self.is_whole else points[-1]
        self.axes = torch.eye(size).double() if self.is_whole else _main_directions(points)
        self.path = (points - self.origin) @ self.axes.T
        moved, kept = (p - p.mean(0) for p in (points, self.path))
        self.share = float(kept.square().sum() / moved.square().sum())
        extent = float((self.path.amax(0) - self.path.amin(0)).max())
        slope, hessian = self._differences(self.path[-1], STEP * extent)
        self.curvatures, self.directions = torch.linalg.eigh(hessian)
        best = self.path[-1] - torch.linalg.pinv(hessian, hermitian=True) @ slope
        is_near = (best - self.path).norm(dim=1).min() < NEAR * extent
        self.best = best if quadratic and is_near else None

    def at(self, coordinates: Tensor) -> Tensor:
        """Return the loss at coordinates of shape [..., d], shape [...]."""
        flat = coordinates.reshape(-1, coordinates.shape[-1])
        return self._loss(self.origin + flat @ self.axes).reshape(coordinates.shape[:-1])

    def _differences(self, at: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Return gradient, shape [d], and Hessian, shape [d, d], by central differences."""
        unit = torch.eye(len(at)).double()
        sums, gaps = unit[:, None] + unit, unit[:, None] - unit
        a, b, c, d = (self.at(at + step * way) for way in (sums, gaps, -gaps, -sums))
        slope = (self.at(at + step * unit) - self.at(at - step * unit)) / (2 * step)
        return slope, (a - b - c + d) / (4 * step**2)


def _main_directions(points: Tensor) -> Tensor:
    """Return the first two principal components of points [K, P], shape [2, P].

    The last point lies on their positive side.
    """
    moved = points - points.mean(0)
    _, vectors = torch.linalg.eigh(moved @ moved.T)  # [K, K]: faster than an SVD of many columns
    axes = torch.linalg.qr(moved.T @ vectors[:, [-1, -2]]).Q.T
    return axes * torch.where(axes @ moved[-1] < 0, -1.0, 1.0)[:, None]

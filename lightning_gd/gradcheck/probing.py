"""Directions in which the loss of a model is probed, and its slope along them."""

import math
from collections.abc import Iterator

from torch import Tensor

from lightning_gd.gradcheck.bench import Bench
from lightning_gd.gradcheck.point import AUTOGRAD, Point, Weights
from lightning_gd.gradcheck.twin import shaken, shaken_batch

# Of the length at which the error of central differences and the rounding of the loss are alike.
FACTORS = (1, 1 / 16, 16)


def slope_of(bench: Bench, point: Point, way: Weights, exact: float) -> tuple[float, float]:
    """Return the derivative of the loss along a direction, and how uncertain it is.

    Central differences over two lengths differ by at least the error of the shorter one. The
    jump of the slope at a kink of the loss is what the one-sided differences over these
    lengths have in common. Other lengths are tried while the uncertainty is above `exact`.

    Args:
        bench: The model.
        point: Where.
        way: The direction, in which the loss changes by its own size over a length of 1.
        exact: The uncertainty that is small enough.
    """
    best, noise = (math.nan, math.inf), _noise(bench, point)
    for step in (bench.eps ** (1 / 3) * factor for factor in FACTORS):
        sides = [_one_sided(bench, point, way, s * step) for s in (-1, 1, -1 / 8, 1 / 8)]
        left, right, near_left, near_right = sides
        slope = (near_left + near_right) / 2
        jump = abs(8 * (near_right - near_left) - (right - left)) / 7
        doubt = 4 * abs((left + right) / 2 - slope) + jump + 16 * noise / step
        if doubt < best[1]:
            best = slope, doubt
        if best[1] <= exact:
            break
    return best


def direction(bench: Bench, point: Point, name: str, along: float = 1.0) -> Tensor:
    """Return a direction of the parameter's length, along its gradient and a random one."""
    gradient = point.gradients[AUTOGRAD][name].nan_to_num(0, 0, 0)
    other, size = bench.random(gradient), point.sizes[name]
    way = other / other.norm() + (along * gradient / size if size > 0 else 0.0)
    if not way.norm() > 0.1:  # the two point against each other
        way = other
    if name in bench.padding:
        way[bench.padding[name]] = 0
    return way * (point.lengths[name] / way.norm())


def directions(bench: Bench, point: Point, name: str) -> Iterator[Tensor]:
    """Return three directions: along the gradient, random, and against it."""
    return (direction(bench, point, name, along) for along in (1.0, 0.0, -1.0))


def slopes_of(point: Point, kind: str, way: Weights) -> list[float]:
    """Return the slope that a gradient gives along each parameter's direction."""
    return [float((point.gradients[kind][n] * v).sum()) for n, v in way.items()]


def _noise(bench: Bench, point: Point) -> float:
    """Return 8 times the change of the loss by changes of all numbers in their last digit."""
    if point.noise is None:
        near = {n: shaken(value, bench.eps, bench.generator) for n, value in point.weights.items()}
        batch, bench.batch = bench.batch, shaken_batch(bench.batch, bench.eps, bench.generator)
        change, bench.batch = abs(bench.loss(near) - point.loss), batch
        point.noise = 8 * change + 8 * bench.eps * abs(point.loss)
    return point.noise


def _one_sided(bench: Bench, point: Point, way: Weights, t: float) -> float:
    near = {name: point.weights[name] + t * value for name, value in way.items()}
    return (bench.loss({**point.weights, **near}) - point.loss) / t

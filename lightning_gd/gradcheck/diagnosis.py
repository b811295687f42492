"""Names what is wrong with an explicit gradient, from how it differs from the right one.

Each rule looks at the gradient of one parameter on four batches: the batch and an altered copy
of it, both once more with every row repeated. Repeating the rows leaves a mean as it is and
doubles a sum, which tells the factor N from the factor 2 whatever N; altering the batch
changes every term except those of the parameters alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIKE = 1e-6  # float64 gradients agree to about 1e-13, usual mistakes differ by 1e-3 and more

Pair = tuple[Tensor, Tensor]  # explicit, autograd


@dataclass(frozen=True)
class Evidence:
    """What was measured for one parameter; all numbers float64.

    Attributes:
        parameter: Its value.
        rows: N.
        noise: Absolute error that rounding explains.
        once: Explicit and autograd gradient on the batch, and on its altered copy.
        twice: The same with every row repeated, 2N rows.
        again: What a second call on the same batch returned.
        others: The true gradients of the other parameters.
    """

    parameter: Tensor
    rows: int
    noise: float
    once: list[Pair]
    twice: list[Pair]
    again: Tensor
    others: Mapping[str, Tensor]


def malformed(value: object, repeated: object, parameter: Tensor, truth: Tensor) -> str | None:
    """What is wrong with the form of a gradient, whatever its numbers; None if nothing is.

    Args:
        value: The gradient that the formula returned.
        repeated: The same with every row of the batch repeated.
        parameter: The parameter that it belongs to.
        truth: The gradient by autograd.
    """
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} where a tensor is wanted"
    if value.shape != parameter.shape:
        return _misshapen(value, repeated, truth)
    if not isinstance(repeated, Tensor) or repeated.shape != value.shape:
        return "reduced along the wrong dimension: the shape follows the number of rows"
    if value.requires_grad:
        return "still on the graph: detach it, p.grad must not require a gradient"
    if value.dtype != parameter.dtype:
        dtypes = f"{value.dtype} where the parameter is {parameter.dtype}"
        return f"{dtypes}: a tensor made inside without the dtype of x?"
    if not value.isfinite().all() and truth.isfinite().all():
        return f"{int((~value.isfinite()).sum())} entries are not finite; autograd's all are"
    return None


def _misshapen(value: Tensor, repeated: object, truth: Tensor) -> str:
    shapes = f"shape {list(value.shape)} where {list(truth.shape)} is wanted"
    if value.ndim == 2 and truth.ndim == 2 and alike(value.T, truth):
        return f"transposed: {shapes}"
    if value.numel() == truth.numel() and alike(value.reshape(truth.shape), truth):
        return f"{shapes}: the numbers are right, the shape is not"
    if not isinstance(repeated, Tensor) or repeated.shape == value.shape:
        return shapes
    if value.shape[1:] == truth.shape and alike(value.mean(0), truth):
        return f"{shapes}: the mean over the rows is missing"
    return f"{shapes}: reduced along the wrong dimension, it follows the number of rows"


def mistaken(evidence: Evidence) -> str:
    """Name of the mistake behind wrong numbers, by the first rule that fits."""
    for rule in (_state, _factor, _swapped, _parameter_term, _row_term, _row_factor):
        if words := rule(evidence):
            return words
    return _worst(evidence)


def _state(e: Evidence) -> str | None:
    first, own = e.once[0]
    if alike(e.again, first, e.noise):
        return None
    if alike(e.again - first, own, e.noise):
        return "a stale sum: a second call returns the first's gradient plus its own"
    return "two calls on one batch differ: the formula keeps state or draws random numbers"


def _factor(e: Evidence) -> str | None:
    """The explicit gradient is a multiple of the true one."""
    k, k2 = (_ratio(*_flat(pairs), e.noise) for pairs in (e.once, e.twice))
    if k is None or k2 is None:
        return None
    words = _name_factor(k, k2, e.rows)
    return words and f"{k:.6g} times the gradient of loss: {words}"


def _name_factor(k: float, k2: float, n: int) -> str | None:
    """Words for a factor that is k on N rows and k2 on 2N; None for 1 or for no known law."""
    if max(abs(k), abs(k2)) <= ALIKE:
        return "it is zero, the term is left out"
    laws: list[tuple[str, Callable[[int], float]]] = [
        ("", lambda rows: 1),
        (f"the sum over the rows instead of the mean (N = {n})", lambda rows: rows),
        (f"divided by the number of rows twice (N = {n})", lambda rows: 1 / rows),
        (f"divided by N - 1 instead of N = {n}", lambda rows: rows / max(rows - 1, 0.5)),
    ]
    for words, law in laws:
        rest = k / law(n)
        if abs(rest - k2 / law(2 * n)) <= ALIKE * abs(rest):
            return " and ".join(filter(None, [words, _plain_factor(rest)])) or None
    return None


def _plain_factor(rest: float) -> str:
    sign = "the sign is wrong" if rest < 0 else ""
    size = abs(rest)
    if abs(size - 1) <= ALIKE:
        return sign
    known = {2: "a factor 2 too much", 0.5: "a factor 2 is missing (½)"}
    near = [words for value, words in known.items() if abs(size - value) <= ALIKE]
    return " and ".join(filter(None, [sign, near[0] if near else f"a factor {size:.6g}"]))


def _swapped(e: Evidence) -> str | None:
    """The gradient of another parameter under this name."""
    for name, gradient in e.others.items():
        same_shape = gradient.shape == e.parameter.shape
        if same_shape and gradient.abs().max() > e.noise and alike(e.once[0][0], gradient, e.noise):
            return f"this is the gradient of {name!r}"
    if e.parameter.ndim == 2 and e.parameter.shape[0] == e.parameter.shape[1]:
        return "transposed" if alike(e.once[0][0].T, e.once[0][1], e.noise) else None
    return None


def _parameter_term(e: Evidence) -> str | None:
    """The difference is the same on every batch: a term that does not see the rows."""
    (d, *altered), (d2, *altered2) = _differences(e.once), _differences(e.twice)
    if not altered or d2.abs().max() <= e.noise:
        return None
    if not (alike(altered[0], d, e.noise) and alike(altered2[0], d2, e.noise)):
        return None
    if not alike(d, d2, e.noise):
        return "a term of the parameters alone (ridge) is divided by, or times, the number of rows"
    for unit, shape in {"parameter": e.parameter, "sign(parameter)": e.parameter.sign()}.items():
        c = _ratio(d, shape, e.noise)
        if c is not None:
            fault = "missing, too small" if c < 0 else "extra, too large"
            difference = f"explicit - autograd = {c:.4g} * {unit} on every batch"
            return f"a term of the parameters alone (ridge) is {fault} or wrong: {difference}"
    return "a term of the parameters alone is missing or wrong: the same error on every batch"


def _row_term(e: Evidence) -> str | None:
    """Only the mean over the rows carries a factor φ(N); a term of the parameters is right.

    Then the difference is (φ(N) − 1) times that mean, whatever the mean is.
    """
    n = e.rows
    d, d2 = torch.cat(_differences(e.once)), torch.cat(_differences(e.twice))
    if n == 1 and alike(d, torch.zeros_like(d), e.noise):
        return "right on one row, wrong when it is repeated: a sum instead of a mean, or N - 1"
    laws = {"summed instead of averaged": (n, 2 * n), "divided by N twice": (1 / n, 0.5 / n)}
    for words, (once, twice) in laws.items():
        if once != 1 and alike(d2 * (once - 1), d * (twice - 1), e.noise * twice):
            return f"the rows are {words} (N = {n}), beside a right term of the parameters"
    return None


def _row_factor(e: Evidence) -> str | None:
    """Explicit = α · autograd + β · parameter on both batches: α is the factor of the rows."""
    if len(e.once) < 2 or e.parameter.numel() < 2 or not e.parameter.abs().max():
        return None
    explicit, truth = _flat(e.once)
    columns = torch.stack([truth, e.parameter.flatten().repeat(2)], dim=1)
    alpha, beta = torch.linalg.lstsq(columns, explicit).solution.tolist()
    if not alike(columns @ explicit.new_tensor([alpha, beta]), explicit, e.noise):
        return None
    words = "zero" if abs(alpha) <= ALIKE else _plain_factor(alpha)
    return words and f"the term of the rows: {words}; beside it {beta:.4g} * parameter"


def _worst(e: Evidence) -> str:
    explicit, truth = e.once[0]
    k = int((explicit - truth).abs().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(k), truth.shape)]
    values = f"explicit {explicit.flatten()[k]:.6g}, autograd {truth.flatten()[k]:.6g}"
    return f"no usual mistake fits; the worst entry {index} is {values}"


def name_reduction(
    expected: Tensor, actual: Tensor, world_size: int, noise: float, local: Tensor | None
) -> str:
    """Name of the mistake in a gradient that was reduced over `world_size` processes."""
    if local is not None and alike(actual, local, noise):
        return "the reduction is missing: this is the gradient of this process's own rows"
    k = _ratio(actual, expected, noise)
    if k is not None and world_size > 1:
        if abs(k - world_size) <= 1e-3 * world_size:
            return f"{world_size} times too large: summed over the processes instead of averaged"
        if abs(k * world_size - 1) <= 1e-3:
            return f"{world_size} times too small: divided by the number of processes twice"
    if k is not None:
        return f"a factor {k:.6g}"
    return "no factor fits: the reduction is missing, or uneven shares were averaged as equal ones"


def alike(actual: Tensor, expected: Tensor, noise: float = 0.0) -> bool:
    """Whether two tensors of one shape agree up to noise and a relative 1e-6."""
    if actual.shape != expected.shape or not expected.numel():
        return actual.shape == expected.shape
    return bool((actual - expected).abs().max() <= noise + ALIKE * expected.abs().max())


def _ratio(actual: Tensor, expected: Tensor, noise: float) -> float | None:
    """The k of actual = k · expected, if there is one."""
    if expected.abs().max() <= noise:
        return None
    k = float((actual * expected).sum() / expected.square().sum())
    return k if alike(actual, k * expected, noise) else None


def _flat(pairs: Iterable[Pair]) -> Pair:
    explicit, truth = zip(*pairs, strict=True)
    return torch.cat([t.flatten() for t in explicit]), torch.cat([t.flatten() for t in truth])


def _differences(pairs: Iterable[Pair]) -> list[Tensor]:
    return [explicit - truth for explicit, truth in pairs]

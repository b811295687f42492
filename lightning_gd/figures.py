"""Pictures of a run as matplotlib figures, from plain numbers; pyplot is not used.

Colours are those of Okabe and Ito, which readers with any colour vision tell apart. Odd is always
vermilion and even always blue, in bars and in weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

Curve: TypeAlias = tuple[ArrayLike, ArrayLike]  # updates and values, both of shape [K]
Curves: TypeAlias = Mapping[str, Curve]  # by part: train, val, test

BLACK, ODD, EVEN = "#000000", "#D55E00", "#0072B2"  # vermilion is odd, blue is even
PARTS = {"train": EVEN, "val": "#009E73", "test": ODD}
COLUMNS = 5  # of the sheet of wrong digits
TEXT, SMALL = 14, 12  # points, readable at half size
LARGEST = 1e100  # loss that is drawn
DPI = 150  # dots per inch: a loss curve is 1,200 by 750


def loss_curves(
    measured: Curves,
    predicted: Iterable[Curve] = (),
    optimum: float | None = None,
    title: str = "",
) -> Figure:
    """Draw the losses by update on a log scale.

    A curve that turns at more than a third of its points, as of mini-batches or of a rate that
    overshoots, is drawn thin, and its running mean over it. The first loss of exactly 0 is marked
    at the lower edge.

    Args:
        measured: What was logged.
        predicted: Predicted curves, drawn thin and dashed over the measured ones.
        optimum: The lowest loss possible on the training rows, drawn as a horizontal line.
        title: Such as the model, its data and its learning rate.
    """
    figure, axes = _figure("update", "loss (log scale)", title=title)
    dashes: dict[str, Any] = {"lw": 1.2, "ls": "--"}
    for i, (part, (steps, losses)) in enumerate(measured.items()):
        size = 1 if i else 2  # both are seen where they are equal
        style: dict[str, Any] = {"color": PARTS[part], "lw": 2.5 * size}
        updates, values = np.asarray(steps), np.array(losses, float)
        finite = values < LARGEST  # not NaN either
        if _is_rough(values[finite]):
            dashes = {"lw": 0.5, "alpha": 0.5, "zorder": 1}  # they would hide what is below them
            means = _running_mean(updates[finite], values[finite])
            _plot(axes, (updates, values), color=PARTS[part], lw=0.8, alpha=0.5)
            _plot(axes, means, **style, label=f"{part}, running mean")
        else:
            marker = "o" if len(values) < 30 else ""
            _plot(axes, (updates, values), **style, marker=marker, label=part)
        for step in updates[values == 0][:1]:
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "ls": ""}
            edge["ms"] = 10 * size
            axes.plot(step, 0, marker="v", color=PARTS[part], **edge, label=f"{part} is 0")
    for curve in predicted:
        _plot(axes, curve, color=BLACK, **dashes, label="predicted")
    if optimum is not None:
        seen = optimum > 1e-3 * axes.get_ylim()[0]
        label = f"optimum {optimum:.4g}{'' if seen else ', far below'}"
        axes.axhline(optimum if seen else np.nan, color="#707070", lw=1.5, ls=":", label=label)
    return with_legend(figure)


def _is_rough(values: np.ndarray) -> bool:
    """Tell whether a curve of 60 points or more turns at over a third of them."""
    slopes = np.sign(np.diff(values))
    return len(values) >= 60 and np.mean(slopes[1:] != slopes[:-1]) > 1 / 3


def _running_mean(updates: np.ndarray, values: np.ndarray) -> Curve:
    """Return the means of every twentieth of the points, each at the middle of its points."""
    window = len(values) // 20
    sums = np.cumsum(np.concatenate([[0.0], values]))
    means = (sums[window:] - sums[:-window]) / window
    return updates[window // 2 : window // 2 + len(means)], means


def weight_picture(weight: ArrayLike) -> Figure:
    """Draw 784 weights at their pixels; white is 0.

    Args:
        weight: Shape [784]. The colours end at the 99.5th percentile of the magnitudes, so that
            a few large weights do not make the others pale.
    """
    weight = np.asarray(weight, float).reshape(28, 28)
    most = float(np.quantile(np.abs(weight), 0.995)) or 1.0
    figure, axes = _figure("column (pixel)", "row (pixel)", (6.6, 5.4))
    image = axes.imshow(weight, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.grid(False)
    axes.set_title("weights: + speaks for odd, − for even", fontsize=TEXT)
    axes.set_xlabel("column (pixel)\nborder: black in every digit, its weights change alike")
    bar = figure.colorbar(image, ax=axes, extend="both")
    bar.set_label("weight (score per unit of the scaled pixel)", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def wrong_digits(
    pixels: ArrayLike, target: ArrayLike, scores: ArrayLike, labels: ArrayLike, most: int = 20
) -> Figure:
    """Draw the digits on the wrong side of 0, the furthest first, each with label and score.

    Args:
        pixels: Raw pixels, shape [N, 784].
        target: +1 for odd, −1 for even, shape [N].
        scores: Predictions ŷ, shape [N]; odd where ŷ > 0.
        labels: What the captions call the digits, shape [N].
        most: Largest number of digits shown.
    """
    pixels, labels, scores = np.asarray(pixels), np.asarray(labels), np.asarray(scores)
    wrong = np.flatnonzero((scores > 0) != (np.asarray(target) > 0))
    shown = wrong[np.argsort(-np.abs(scores[wrong]), kind="stable")][:most]
    rows = max(1, -(-len(shown) // COLUMNS))
    figure = Figure(figsize=(8, 0.7 + 1.6 * rows), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()  # one for all digits: the layout of twenty takes seconds
    axes.axis("off")
    sheet = np.zeros((rows * 37, COLUMNS * 36))
    for k, i in enumerate(shown):
        top, left = k // COLUMNS * 37 + 8, k % COLUMNS * 36 + 4
        sheet[top : top + 28, left : left + 28] = pixels[i].reshape(28, 28)
        caption = f"{labels[i]}: {scores[i]:+.2f}".replace("-", "−")
        axes.text(left + 14, top - 1, caption, fontsize=TEXT, ha="center")
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255)
    worst = f", the worst {len(shown)}:" if len(shown) < len(wrong) else ""
    title = f"{len(wrong):,} of {len(scores):,} digits scored wrongly{worst}"
    axes.set_title(f"{title}\nlabel and score (odd if score > 0)", fontsize=TEXT)
    return figure


def accuracy_by_digit(accuracies: Sequence[float], overall: float, majority: float) -> Figure:
    """Draw the accuracy of the decision odd or even for each digit.

    Args:
        accuracies: For the digits 0 to 9, in [0, 1]; NaN where there is none.
        overall: Accuracy over all digits.
        majority: Accuracy of always predicting the majority class.
    """
    figure, axes = _figure("digit", "accuracy")
    for first, name, colour in ((0, "even", EVEN), (1, "odd", ODD)):
        axes.bar(range(first, 10, 2), accuracies[first::2], color=colour, label=f"{name} digits")
    for digit, value in enumerate(accuracies):
        axes.text(digit, 0.03, f"{value:.2f}", color="white", fontsize=TEXT, ha="center")
    axes.axhline(overall, color=BLACK, lw=2, label=f"all digits {overall:.3f}")
    axes.axhline(majority, color=BLACK, lw=2, ls=":", label=f"majority class {majority:.3f}")
    axes.set_xticks(range(10))
    axes.set_ylim(0, 1)
    axes.grid(False, axis="x")
    return with_legend(figure)


def fitted_lines(
    x: ArrayLike, y: ArrayLike, at: ArrayLike, lines: Sequence[tuple[int, ArrayLike]]
) -> Figure:
    """Draw points and the line fitted to them after several numbers of updates.

    Args:
        x: Inputs, shape [N].
        y: Targets, shape [N].
        at: Where the lines were evaluated, shape [K].
        lines: Numbers of updates and the predictions at `at`, shape [K], in ascending order. At
            most 6 are drawn, and none that nearly coincides with the last.
    """
    figure, axes = _figure("x", "y")
    low, high = float(np.min(np.asarray(y))), float(np.max(np.asarray(y)))
    height, last = high - low or 1.0, np.asarray(lines[-1][1])
    apart = [line for line in lines if np.abs(np.asarray(line[1]) - last).max() > 0.04 * height]
    apart.append(lines[-1])
    kept = np.linspace(0, len(apart) - 1, min(len(apart), 6)).round().astype(int)
    shades = matplotlib.colormaps["cividis"](np.linspace(0.95, 0.05, len(kept)))
    for i, shade in zip(kept, shades, strict=True):
        updates, values = apart[i]
        label = f"after {updates:,} update{'s' * (updates != 1)}"
        axes.plot(at, np.asarray(values), color=shade, lw=4 if i == kept[-1] else 2.5, label=label)
    axes.plot(x, y, "o", color=ODD, ms=9, mec="white", label="data", zorder=3)
    bottom, top = axes.get_ylim()  # cut, or the lines of a diverging run would hide the data
    axes.set_ylim(max(bottom, low - height), min(top, high + height))
    return with_legend(figure)


def _figure(
    x: str, y: str, size: tuple[float, float] = (8, 5), title: str = ""
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=TEXT)
    name_axes(axes, x, y)
    return figure, axes


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Name the axes, in the style of all pictures."""
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)


def _plot(axes: Axes, curve: Curve, **style: Any) -> None:
    """Plot losses on a log scale, with gaps where they are not positive or not finite."""
    losses = np.array(curve[1], float)
    losses[~((losses > 0) & (losses < LARGEST))] = np.nan
    axes.plot(curve[0], losses, **style)
    axes.set_yscale("log")


def _minor(digits: str, x: float, _: Any) -> str:
    return f"{x:g}" if f"{x:e}"[0] in digits else ""


def with_legend(figure: Figure) -> Figure:
    """Add the legend of the first axes above them, and plain numbers to short log axes."""
    axes = figure.axes[0]
    for log in (axes for axes in figure.axes if axes.get_yscale() == "log"):
        low, high = log.get_ylim()
        if high < 50 * low:
            log.yaxis.set_major_formatter("{x:g}")
            digits = "123456789" if high < 5 * low else "12346"
            log.yaxis.set_minor_formatter(partial(_minor, digits))
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # one for all predicted curves
    columns = 2 if len(entries) == 4 else 3
    style = {"ncols": columns, "fontsize": SMALL, "frameon": False}
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", **style)
    return figure

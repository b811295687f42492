"""Pictures of a run as matplotlib figures, from plain numbers; no state of pyplot is touched.

Colours are those of Okabe and Ito, which readers with any colour vision tell apart. Odd is always
vermilion and even always blue, in bars and in weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

Curve: TypeAlias = "tuple[ArrayLike, ArrayLike]"  # updates and values, both of shape [K]

BLACK, GREY = "#000000", "#707070"
ODD, EVEN = "#D55E00", "#0072B2"  # vermilion, blue
COLOURS = {"train": EVEN, "val": "#009E73", "test": ODD}
ROADS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v")
COLUMNS = 5  # of the sheet of wrong digits
TEXT, SMALL = 14, 12  # points; at 100 dots an inch they are readable at half size


def loss_curves(
    measured: Mapping[str, Curve],
    predicted: Mapping[str, Curve] | None = None,
    optimum: float | None = None,
) -> Figure:
    """Losses by update on a log scale.

    Args:
        measured: Curves by part: `train`, `val`, `test`.
        predicted: Curves of the theory, drawn thin and dashed over them.
        optimum: The lowest loss possible on the training rows, drawn as a horizontal line.
    """
    figure, axes = _figure("update", "loss (log scale)")
    for i, (part, (updates, losses)) in enumerate(measured.items()):
        colour, width = COLOURS.get(part, GREY), 5 if i == 0 else 2.5  # both seen where they meet
        # A curve of few points would vanish between them.
        marker = "o" if np.size(updates) < 30 else ""
        axes.plot(updates, _drawable(losses), color=colour, lw=width, marker=marker, label=part)
    for updates, losses in (predicted or {}).values():
        _dashed(axes, updates, losses)
    if optimum is not None:
        lowest = min((v for v in map(_least, measured.values()) if v > 0), default=1.0)
        if optimum > 1e-3 * lowest:
            axes.axhline(optimum, color=GREY, lw=1.5, ls=":", label=f"optimum {optimum:.4g}")
        else:  # on this scale the line would be decades below every curve
            axes.plot([], [], color=GREY, ls="", label=f"optimum {optimum:.2g}, below the axis")
    _log_scale(axes)
    _legend(figure)
    return figure


def weight_picture(weight: ArrayLike) -> Figure:
    """The 784 weights where their pixels are; white is 0.

    Args:
        weight: Shape [784]. The scale ends at the 99.5th percentile of the magnitudes, so that
            single pixels do not pale the rest; arrows at the colour bar say where it was passed.
    """
    weight = np.asarray(weight, float).reshape(28, 28)
    most = float(np.quantile(np.abs(weight), 0.995)) or 1.0
    extend = {(0, 0): "neither", (0, 1): "max", (1, 0): "min", (1, 1): "both"}
    figure, axes = _figure("column (pixel)", "row (pixel)", (6.6, 5.4))
    image = axes.imshow(weight, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.grid(False)
    axes.set_title("weights: + speaks for odd, − for even", fontsize=TEXT)
    over = int(weight.min() < -most), int(weight.max() > most)
    bar = figure.colorbar(image, ax=axes, extend=extend[over])
    bar.set_label("weight (score per unit of the scaled pixel)", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    bar.formatter.set_powerlimits((-3, 3))  # pyright: ignore[reportAttributeAccessIssue]
    bar.ax.yaxis.get_offset_text().set_fontsize(SMALL)
    return figure


def wrong_digits(
    pixels: ArrayLike,
    target: ArrayLike,
    scores: ArrayLike,
    labels: ArrayLike | None = None,
    most: int = 20,
) -> Figure:
    """The digits on the wrong side of 0, the furthest first, each with its label and score.

    Args:
        pixels: Raw pixels, shape [N, 784].
        target: +1 for odd, −1 for even, shape [N].
        scores: Predictions ŷ, shape [N]; odd where ŷ > 0.
        labels: The digits, shape [N]; without them `odd` or `even` is written.
        most: Digits shown at most.
    """
    pixels, target, scores = np.asarray(pixels), np.asarray(target), np.asarray(scores)
    wrong = np.flatnonzero((scores > 0) != (target > 0))
    order = wrong[np.argsort(-np.abs(scores[wrong]), kind="stable")][:most]
    names = np.where(target > 0, "odd", "even") if labels is None else np.asarray(labels)
    rows = max(1, -(-len(order) // COLUMNS))
    # One picture of all: as many axes would take seconds to lay out.
    cell_high, cell_wide = 28 + 9, 28 + 8
    sheet = np.zeros((rows * cell_high, COLUMNS * cell_wide))
    figure = Figure(figsize=(8, 0.7 + 1.6 * rows), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    for k, i in enumerate(order):
        top, left = k // COLUMNS * cell_high + 8, k % COLUMNS * cell_wide + 4
        sheet[top : top + 28, left : left + 28] = pixels[i].reshape(28, 28)
        text = axes.text(left + 14, top, f"{names[i]}: {_signed(float(scores[i]))}", fontsize=TEXT)
        text.set_horizontalalignment("center")
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255)
    worst = f", the worst {len(order)}:" if len(order) < len(wrong) else ""
    axes.set_title(
        f"{len(wrong):,} of {len(scores):,} digits scored wrongly{worst}\n"
        "label and score (odd if score > 0)",
        fontsize=TEXT,
    )
    return figure


def accuracy_by_digit(accuracies: ArrayLike, overall: float, majority: float) -> Figure:
    """The share of each digit that is told odd or even rightly.

    Args:
        accuracies: For the digits 0 to 9, in [0, 1]; NaN where there is none.
        overall: Accuracy over all digits.
        majority: Accuracy of always naming the commoner class.
    """
    values = np.asarray(accuracies, float)
    figure, axes = _figure("digit", "share told right")
    for first, name, colour in ((0, "even", EVEN), (1, "odd", ODD)):
        axes.bar(range(first, 10, 2), values[first::2], color=colour, label=f"{name} digits")
    for digit, value in enumerate(values):
        if np.isfinite(value):
            text = axes.text(digit, 0.03, f"{value:.2f}", color="white", fontsize=TEXT)
            text.set_horizontalalignment("center")
    axes.axhline(overall, color=BLACK, lw=2, label=f"all digits {overall:.3f}")
    axes.axhline(majority, color=BLACK, lw=2, ls=":", label=f"majority class {majority:.3f}")
    axes.set_xticks(range(10))
    axes.set_ylim(0, 1)
    axes.grid(False, axis="x")
    _legend(figure)
    return figure


def fitted_lines(
    x: ArrayLike,
    y: ArrayLike,
    at: ArrayLike,
    lines: Sequence[tuple[int, ArrayLike]],
    most: int = 6,
) -> Figure:
    """Points and the line through them at several updates.

    Args:
        x: Inputs, shape [N].
        y: Targets, shape [N].
        at: Where the lines were evaluated, shape [K].
        lines: Updates done and the predictions at `at`, shape [K], in the order of the run.
        most: Lines drawn at most; those that would lie on one already drawn are left out.
    """
    figure, axes = _figure("x", "y")
    chosen = _apart(lines, 0.04 * float(np.ptp(np.asarray(y)) or 1), most)
    shades = matplotlib.colormaps["cividis"](np.linspace(0.95, 0.05, len(chosen)))
    for (updates, values), shade in zip(chosen, shades, strict=True):
        last = updates == lines[-1][0]
        label = f"after {updates:,} update{'s' * (updates != 1)}"
        axes.plot(at, np.asarray(values), color=shade, lw=4 if last else 2.5, label=label)
    axes.plot(x, y, "o", color=ODD, ms=9, mec="white", label="data", zorder=3)
    # A run that diverges must not squeeze the data into a dot.
    low, high = float(np.min(np.asarray(y))), float(np.max(np.asarray(y)))
    margin = (high - low) or 1.0
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - margin), min(top, high + margin))
    _legend(figure)
    return figure


def compared_curves(
    roads: Mapping[str, Mapping[str, Curve]], predicted: Mapping[str, Curve] | None = None
) -> Figure:
    """The losses of several roads, one panel a part, on shared axes with a log scale.

    Coinciding curves can be told apart by their marks: each road has its own shape and colour,
    and its marks stand in the gaps between those of the others.

    Args:
        roads: For each road its curves by part: `train`, `test`.
        predicted: Curves of the theory by part, dashed over all.
    """
    parts = list(next(iter(roads.values())))
    figure = Figure(figsize=(4.2 * len(parts) + 1.6, 5.6), dpi=100, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(parts), sharey=True))
    for axes, part in zip(panels, parts, strict=True):
        _dress(axes, "update", "loss (log scale)" if part == parts[0] else "")
        axes.set_title(f"{part} loss", fontsize=TEXT)
        for i, (road, curves) in enumerate(roads.items()):
            updates, losses = curves[part]
            axes.plot(
                updates,
                _drawable(losses),
                color=ROADS[i % len(ROADS)],
                lw=1.5,
                marker=MARKERS[i % len(MARKERS)],
                ms=9,
                markevery=(0.2 * i / len(roads), 0.2),  # along the curve, in axes' diagonals
                label=road,
            )
        if predicted and part in predicted:
            _dashed(axes, *predicted[part])
        _log_scale(axes)
        _limit(axes, [curves[part] for curves in roads.values()])
    _legend(figure, panels[0])
    return figure


def _figure(x: str, y: str, size: tuple[float, float] = (8, 5)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, x, y)
    return figure, axes


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)


def _dashed(axes: Axes, updates: ArrayLike, losses: ArrayLike) -> None:
    axes.plot(updates, _drawable(losses), color=BLACK, lw=1.2, ls="--", label="predicted", zorder=4)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 50 * low:  # plain numbers, also between the powers of ten
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "12346" else "")
    axes.tick_params(which="both", labelsize=SMALL)


def _legend(figure: Figure, axes: Axes | None = None) -> None:
    """Above the axes, where it can hide nothing."""
    handles, labels = (axes or figure.axes[0]).get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=2 if len(entries) == 4 else 3,
        fontsize=SMALL,
        frameon=False,
    )


def _drawable(values: ArrayLike) -> np.ndarray:
    """What a log axis can show; the rest becomes a gap."""
    values = np.array(values, float)
    values[~((values > 0) & (values < 1e100))] = np.nan  # its margins overflow near 1e308
    return values


def _least(curve: Curve) -> float:
    drawable = _drawable(curve[1])
    return float(np.nanmin(drawable)) if np.isfinite(drawable).any() else 0.0


def _limit(axes: Axes, curves: Sequence[Curve]) -> None:
    """Let a curve that explodes leave the picture rather than flatten those that do not."""
    losses = [v for v in (_drawable(values) for _, values in curves) if np.isfinite(v[0])]
    tame = [v for v in losses if np.nanmax(v) <= 1e3 * v[0]]
    if 0 < len(tame) < len(losses):
        axes.set_ylim(min(map(np.nanmin, tame)) / 2, 1e3 * max(v[0] for v in tame))


def _apart(
    lines: Sequence[tuple[int, ArrayLike]], distance: float, most: int
) -> list[tuple[int, ArrayLike]]:
    """From the last back to the first, the lines that lie apart; the last and the first always."""
    kept = [lines[-1]]
    for line in reversed(lines[:-1]):
        gaps = [np.abs(np.asarray(line[1]) - np.asarray(other)).max() for _, other in kept]
        if min(gaps) > distance:
            kept.append(line)
    kept = kept[::-1]
    if len(kept) > most:
        kept = [kept[i] for i in np.linspace(0, len(kept) - 1, most).round().astype(int)]
    return kept


def _signed(score: float) -> str:
    return f"{score:+.2f}".replace("-", "−")

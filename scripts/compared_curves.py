"""The picture of `compare.py`: the losses of several implementations, one panel per part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_gd.figures import BLACK, SMALL, TEXT, Curve, Curves

MODES = (("#E69F00", "o"), ("#56B4E9", "s"), ("#009E73", "^"), ("#D55E00", "D"), ("#CC79A7", "v"))


def compared_curves(modes: Mapping[str, Curves], predicted: Curves) -> Figure:
    """Draw the losses of several modes, one panel per part, on shared axes with a log scale.

    Coinciding curves can be told apart by their marks, which have a shape and colour for each
    mode and do not overlap. A curve that diverges is drawn up to 1,000 times its first loss.

    Args:
        modes: The curves of each mode, of the same parts.
        predicted: Predicted curves, dashed over all.
    """
    figure = Figure(figsize=(4.2 * len(predicted) + 1.6, 5.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(predicted), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, predicted, strict=True):
        axes.set_title(f"{part} loss", fontsize=TEXT)
        axes.set_xlabel("update", fontsize=TEXT)
        axes.tick_params(which="both", labelsize=SMALL)
        axes.grid(color="#DDDDDD")
        for i, (mode, curves) in enumerate(modes.items()):
            colour, marker = MODES[i % len(MODES)]
            along = (0.2 * i / len(modes), 0.2)  # first mark and distance, in diagonals of the axes
            style = {"marker": marker, "ms": 9, "markevery": along, "color": colour, "lw": 1.5}
            _plot(axes, curves[part], label=mode, **style)
        _plot(axes, predicted[part], color=BLACK, lw=1.2, ls="--", label="predicted")
    panels[0].set_ylabel("loss (log scale)", fontsize=TEXT)
    handles, labels = panels[0].get_legend_handles_labels()
    style = {"ncols": 3, "fontsize": SMALL, "frameon": False}
    figure.legend(handles, labels, loc="outside upper center", **style)
    return figure


def _plot(axes: Axes, curve: Curve, **style: Any) -> None:
    losses = np.array(curve[1], float)
    losses[~((losses > 0) & (losses <= 1e3 * losses[0]))] = np.nan
    axes.plot(curve[0], losses, **style)
    axes.set_yscale("log")

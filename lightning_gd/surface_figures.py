"""The picture of a run on the surface of its loss, and its animation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import ArrayLike
from PIL import Image

from lightning_gd.figures import BLACK, DPI, EVEN, ODD, SMALL, TEXT, name_axes, with_legend
from lightning_gd.surface import Surface

RATIO, MARGIN = 0.75, 1.3  # of the plane: height by width; its size by that of the path
FINE, COARSE, LEVELS = 61, 45, 13  # points along the width, of a quadratic loss or not; contours
FRAMES, COLOURS, SECONDS, PAUSE = 40, 64, 6.0, 1.5  # of an animation, which stops at the end

Fit = tuple[ArrayLike, ArrayLike, ArrayLike, Sequence[ArrayLike]]


def surface_figure(surface: Surface, names: Sequence[str]) -> Figure:
    """Draw the path of a run over the contours of the loss, or over the curve for one number.

    Args:
        surface: Of the run.
        names: Of the trained numbers, where there are one or two.
    """
    figure = Figure(figsize=(8, 6), dpi=DPI, layout="constrained")
    line, points = _draw(figure.add_subplot(), surface, names)
    line.set_data(*points.T)
    return with_legend(figure)


def animate(file: Path, surface: Surface, names: Sequence[str], fit: Fit | None = None) -> None:
    """Write a GIF: the path on the surface, the loss below, and the fit beside it.

    Args:
        file: Where to write.
        surface: Of the run.
        names: As for `surface_figure`.
        fit: Inputs and targets, shape [N]; where the fit is evaluated, shape [M], and its values
            at each point of the path that is shown, shape [M].
    """
    figure = Figure(figsize=(11 if fit else 7, 7), dpi=80, layout="constrained")
    grid = figure.add_gridspec(2, 2 if fit else 1, height_ratios=(3, 1))
    plane, below = figure.add_subplot(grid[0, -1]), figure.add_subplot(grid[1, :])
    path, points = _draw(plane, surface, names)
    updates, losses = surface.updates[: surface.shown].numpy(), surface.losses.numpy()
    moving: list[Any] = [path, *_draw_losses(below, updates, losses)]
    if fit:
        moving.append(_draw_data(figure.add_subplot(grid[0, 0]), *fit[:2]))
    with_legend(figure)

    def move(k: int) -> None:
        path.set_data(*points[: k + 1].T)
        moving[1].set_data(updates[k : k + 1], losses[k : k + 1])
        moving[2].set_text(f"update {updates[k]:,}, loss {losses[k]:.3g}")
        if fit:
            moving[3].set_data(fit[2], fit[3][k])

    shown = sorted({round(k) - 1 for k in np.geomspace(1, len(points), FRAMES)})
    _write(file, figure, moving, move, shown)


def _draw_losses(axes: Axes, updates: np.ndarray, losses: np.ndarray) -> tuple[Line2D, Text]:
    """Draw the losses by update; return the point and the title that move."""
    name_axes(axes, "update", "loss")
    axes.plot(updates, losses, color=EVEN, lw=2)
    axes.set_yscale("log" if losses.min() > 0 else "linear")
    axes.locator_params("x", integer=True)
    return axes.plot([], [], "o", color=ODD, ms=10)[0], axes.set_title("update", fontsize=TEXT)


def _draw_data(axes: Axes, x: ArrayLike, y: ArrayLike) -> Line2D:
    """Draw the data; return the line that moves."""
    name_axes(axes, "x", "y")
    axes.plot(x, y, "o", color=ODD, ms=9, mec="white")
    axes.margins(y=1)
    return axes.plot([], [], color=EVEN, lw=3)[0]


def _write(file: Path, figure: Figure, moving: list[Any], move: Callable, ks: list[int]) -> None:
    """Write one frame for each k; only the artists that `move(k)` changes are drawn again."""
    for artist in moving:
        artist.set_animated(True)
    canvas, frames = FigureCanvasAgg(figure), []
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)
    for k in ks:
        move(k)
        canvas.restore_region(still)
        for artist in moving:
            artist.axes.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    colours = frames[-1].quantize(COLOURS)
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    times = [round(1000 * SECONDS / max(len(frames), FRAMES // 3))] * len(frames)
    times[-1] += round(1000 * PAUSE)
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def _draw(axes: Axes, surface: Surface, names: Sequence[str]) -> tuple[Line2D, np.ndarray]:
    """Draw all but the path; return its line, still empty, and its points, shape [K, 2]."""
    names = (
        [*names, "loss"] if surface.is_whole else ["main direction of the path", "second direction"]
    )
    name_axes(axes, *names[:2])
    points, best, updates = surface.path.numpy(), surface.best, surface.updates.tolist()
    if points.shape[1] == 1:
        points = np.column_stack([points, surface.losses])
        _draw_curve(axes, surface)
    else:
        _draw_contours(axes, surface)
    if best is not None:
        label = "optimum" if surface.is_whole else "lowest point here"
        at = [*best, surface.at(best)][:2]
        axes.plot(*at, "*", color=BLACK, ms=20, mec="white", label=label, zorder=3)
    cut = f" of {updates[-1]:,}" if surface.shown < len(updates) else ""
    label = f"updates {updates[0]:,} to {updates[surface.shown - 1]:,}{cut}"
    (line,) = axes.plot([], [], "o-", color=ODD, lw=1.2, ms=4, label=label, zorder=4)
    for label, marker, k in (("start", "o", 0), ("last one shown" if cut else "end", "s", -1)):
        style = {"color": ODD, "ms": 9, "mec": "white", "mew": 1.5, "zorder": 5}
        axes.plot(*points[k], marker, label=label, **style)
    return line, points


def _limits(surface: Surface) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest coordinates of the picture, shape [d]."""
    best = [] if surface.best is None else [surface.best]
    seen = np.stack([*surface.path, *best])
    low, high, ratios = seen.min(0), seen.max(0), np.array([1, RATIO])[: seen.shape[1]]
    half = MARGIN / 2 * ((high - low) / ratios).max() * ratios
    return (low + high) / 2 - half, (low + high) / 2 + half


def _draw_curve(axes: Axes, surface: Surface) -> None:
    x = np.linspace(*_limits(surface), 4 * FINE)
    label = f"loss, curvature {surface.curvatures[0]:.3g}"
    axes.plot(x, surface.at(torch.tensor(x)), color=EVEN, lw=2.5, label=label)


def _draw_contours(axes: Axes, surface: Surface) -> None:
    """Draw contours, and the directions of curvature at the lowest point or else at the end."""
    low, high = _limits(surface)
    count = np.array([1, RATIO]) * (COARSE if surface.best is None else FINE)
    x, y = (np.linspace(low[i], high[i], round(count[i])) for i in (0, 1))
    loss = surface.at(torch.tensor(np.stack(np.meshgrid(x, y), -1))).numpy()
    center = surface.path[-1] if surface.best is None else surface.best
    bottom = min(loss.min(), float(surface.at(center)))
    levels = bottom + (loss.max() - bottom) * np.linspace(0, 1, LEVELS) ** 3
    filled = axes.contourf(x, y, loss, levels, cmap="Blues")
    axes.contour(x, y, loss, levels, colors="#909090", linewidths=0.6)
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], aspect="equal")
    axes.locator_params(nbins=6)
    bar = axes.figure.colorbar(filled, cax=axes.inset_axes((1.02, 0, 0.04, 1)), ticks=levels[::3])
    bar.set_ticklabels([f"{v if v > 1e-9 * levels[-1] else 0:.3g}" for v in levels[::3]])
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label("loss", fontsize=TEXT)
    for i, name, dashes in ((1, "steepest", "-"), (0, "flattest", "--")):
        way = 0.2 * (high - low)[1] * surface.directions[:, i]
        label = f"{name}, curvature {surface.curvatures[i]:.3g}"
        ends = np.stack([center - way, center + way])
        axes.plot(*ends.T, dashes, color=BLACK, lw=1.5, label=label)
    if not surface.is_whole:
        axes.set_title(f"{surface.share:.1%} of the movement is in this plane", fontsize=TEXT)

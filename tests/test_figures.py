"""Pictures: what they show, that nothing overlaps, and that a fit leaves them where it says."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import events_in
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread

from lightning_gd import LinearRegression, ParityRegressor, PointsData, figures
from lightning_gd.callbacks.pictures import Pictures
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.logger import RunLogger

OKABE_ITO = "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7".split()
RATES = (("train", 0.9), ("test", 0.95))


def falling(rate, points=50):
    return np.arange(points), 30 * rate ** np.arange(points)


def rough(points=200):
    """A falling curve, every second point of it doubled."""
    steps, losses = falling(0.99, points)
    return steps, losses * (1 + steps % 2)


def digits(rows=60):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, rows)
    return rng.integers(0, 256, (rows, 784)), labels % 2 * 2 - 1, rng.normal(size=rows), labels


def every_figure():
    x, at, two = np.arange(1.0, 5), np.linspace(1, 4, 11), {n: falling(r) for n, r in RATES}
    lines = [(k, at * (2 - 0.85**k * 2)) for k in (0, 1, 2, 4, 8, 16, 32, 64, 100)]
    return {
        "loss": figures.loss_curves(two, two.values(), 0.05),
        "rough loss": figures.loss_curves(
            {"train": rough(), "val": falling(0.9, 5)}, title="Model"
        ),
        "loss of 0": figures.loss_curves({"train": (np.arange(5), [4, 2, 1, 0, 0])}, title="Model"),
        "loss in one decade": figures.loss_curves({"train": falling(0.99)}, optimum=1e-30),
        "weights": figures.weight_picture(np.linspace(-1, 0.3, 784)),
        "wrong": figures.wrong_digits(*digits()),
        "accuracy": figures.accuracy_by_digit(list(np.linspace(0.5, 1, 10)), 0.8, 0.51),
        "lines": figures.fitted_lines(x, 2 * x, at, lines),
    }


@pytest.mark.parametrize("name", every_figure())
def test_texts_are_large_apart_and_inside_and_colours_are_safe(name):
    figure = every_figure()[name]
    assert_readable(figure)
    if name != "lines":  # its shades are those of the map cividis
        colours = {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines}
        assert colours <= {*OKABE_ITO, "#707070"}


def test_a_rough_curve_has_its_running_mean_and_a_smooth_one_does_not():
    (axes,) = figures.loss_curves({"train": rough(), "test": falling(0.99, 200)}).axes
    lines: Any = axes.lines
    thin, mean, smooth = lines
    assert [line.get_label() for line in (mean, smooth)] == ["train, running mean", "test"]
    steps, losses = rough()
    np.testing.assert_array_equal(thin.get_ydata(), losses)
    expected = [losses[k - 5 : k + 5].mean() for k in range(5, 196)]  # a twentieth is 10 points
    np.testing.assert_array_equal(mean.get_xdata(), steps[5:196])
    np.testing.assert_allclose(mean.get_ydata(), expected, rtol=1e-12)  # rounding of sums


def test_the_first_loss_of_0_is_marked():
    (axes,) = every_figure()["loss of 0"].axes
    (mark,) = [line for line in axes.lines if line.get_label() == "train is 0"]
    np.testing.assert_array_equal(mark.get_xdata(), [3])


def assert_readable(figure):
    """Texts are large, inside the picture and apart, and axes are named."""
    FigureCanvasAgg(figure).draw()
    for legend in figure.legends:  # above the axes, where it hides no curve
        assert all(legend.get_window_extent().y0 >= axes.bbox.y1 for axes in figure.axes)
    texts = [text for text in drawn_texts(figure) if text.get_text().strip()]
    assert len(texts) > 5 and min(float(text.get_fontsize()) for text in texts) >= 12
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} lies on {other!r}"
    for axes in figure.axes:
        assert not axes.axison or axes.get_ylabel() or axes.get_title() == "test loss"
        assert not axes.axison or axes.get_xlabel() or axes.get_label() == "<colorbar>"


def drawn_texts(figure):
    """The texts inside the limits of the axes; matplotlib also holds labels of other ticks."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    bars = [bar for axes in figure.axes for bar in axes.child_axes]
    for axes in [*figure.axes, *bars]:
        texts += [axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            seen = [tick for tick in ticks if low <= tick.get_loc() <= high]
            labels = [label for tick in seen for label in (tick.label1, tick.label2)]
            texts += [axis.label, *(label for label in labels if label.get_visible())]
    return texts


def test_losses_are_on_a_log_scale_and_the_optimum_is_a_line():
    drawn = [figures.loss_curves({"train": falling(0.9)}, optimum=o) for o in (0.1, None, 1e-30)]
    train, optimum = drawn[0].axes[0].lines
    np.testing.assert_array_equal(train.get_ydata(), falling(0.9)[1])
    assert np.asarray(optimum.get_ydata()).tolist() == [0.1, 0.1]
    # An optimum far below the curve is named, and does not squeeze it.
    limits = [figure.axes[0].get_ylim() for figure in drawn]
    assert drawn[0].axes[0].get_yscale() == "log" and limits[1] == limits[2]
    assert "optimum 1e-30, far below" in [
        text.get_text() for text in drawn[2].legends[0].get_texts()
    ]


@pytest.mark.parametrize("first", [1.0, 0.0])
def test_losses_of_zero_and_infinity_are_gaps(first):
    curve = np.arange(4), [first, 0.0, np.inf, 0.5]
    drawn = figures.loss_curves({"train": curve}).axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, [first or np.nan, np.nan, np.nan, 0.5])


def test_weights_are_centred_at_zero():
    weight = np.linspace(-1, 0.3, 784)
    image = figures.weight_picture(weight).axes[0].images[0]
    assert image.get_clim() == (-np.quantile(np.abs(weight), 0.995), -image.get_clim()[0])
    np.testing.assert_array_equal(image.get_array(), weight.reshape(28, 28))
    assert image.cmap(0.5)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)  # nearly white


def test_the_worst_digits_are_those_furthest_on_the_wrong_side():
    pixels, target, scores, labels = digits()
    axes = figures.wrong_digits(pixels, target, scores, labels, most=3).axes[0]
    worst = sorted(range(60), key=lambda i: scores[i] * target[i])[:3]
    shown = [t.get_text() for t in axes.texts]
    assert shown == [f"{labels[i]}: {scores[i]:+.2f}".replace("-", "−") for i in worst]
    assert f"{(scores * target < 0).sum()} of 60" in axes.get_title()
    sheet = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(sheet[8:36, 4:32], pixels[worst[0]].reshape(28, 28))
    none = figures.wrong_digits(pixels, target, target * 1.0, labels).axes[0]
    assert none.get_title().startswith("0 of 60") and not none.texts


def test_lines_that_coincide_with_the_last_are_left_out():
    at = np.array([0.0, 1.0])
    lines = [(0, at * 0), (1, at), (2, at * 1.001), (3, at * 1.002)]
    axes = figures.fitted_lines([0, 1], [0, 1], at, lines).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["after 0 updates", "after 3 updates", "data"]


def fit(make_trainer, tmp_path, model, data, steps):
    pictures, logger = Pictures(), RunLogger(str(tmp_path), "run")
    trainer = make_trainer(max_steps=steps, logger=logger, callbacks=[pictures])
    trainer.fit(model, datamodule=data)
    events = events_in(logger.log_dir)
    folder = tmp_path / "run" / "version_0" / "pictures"
    return pictures, events, {path.stem: imread(path) for path in folder.glob("*.png")}


@pytest.mark.parametrize("updates_per_step", [1, 7])
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_a_fit_of_points_draws_curves_and_lines(make_trainer, tmp_path, gradient, updates_per_step):
    model = LinearRegression(bias=False, gradient=gradient)
    data = PointsData(passes_per_epoch=20, updates_per_step=updates_per_step)
    pictures, events, files = fit(make_trainer, tmp_path, model, data, 20)
    assert set(files) == {"loss", "fit", "surface"}
    assert set(events.Tags()["images"]) == {f"pictures/{name}" for name in files}
    image = events.Images("pictures/fit")[0]
    assert (image.height, image.width) == files["fit"].shape[:2] and image.step == 20
    assert [updates for updates, _ in pictures.lines] == [0, 1, 2, 4, 8, 16, 20]
    # H = 2/4 Σx² = 15, so each update multiplies the distance from y = 2x by 1 − 0.01·15.
    for updates, line in pictures.lines:
        assert float(line[-1]) == pytest.approx(8 * (1 - 0.85**updates), rel=1e-6)


class Digits(TensorDataModule):
    def load(self):
        pixels, target, _, labels = digits()
        raw, y = torch.tensor(pixels, dtype=torch.uint8), torch.tensor(target).float()
        named = Table(raw, y, 1 / 255, labels=torch.tensor(labels))
        return {"train": named, "test": named if self.num_val == 0 else Table(raw, y, 1 / 255)}


@pytest.mark.parametrize("labels", [True, False])
def test_a_fit_of_digits_draws_weights_and_mistakes(make_trainer, tmp_path, labels):
    data = Digits(batch_size=20, num_val=0 if labels else 5)
    _, events, files = fit(make_trainer, tmp_path, ParityRegressor(lr=0.001), data, 6)
    of_digits = ["wrong_digits", "accuracy_by_digit"] * labels
    assert set(files) == {"loss", "weights", *of_digits}
    assert len(events.Tags()["images"]) == len(files)
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"train/loss" in layout and b"test/loss" in layout

"""Pictures: what they show, that nothing overlaps, and that a fit leaves them where it says."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_gd.callbacks.pictures
from lightning_gd import LinearRegression, ParityRegressor, PointsData, figures
from lightning_gd.callbacks.pictures import CurveMemory, Pictures
from lightning_gd.data.tensors import Table, TensorDataModule
from lightning_gd.logger import RunLogger

OKABE_ITO = {
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
}  # fmt: skip


def falling(rate, points=50):
    return np.arange(points), 30 * rate ** np.arange(points)


def digits(rows=60):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, rows)
    return rng.integers(0, 256, (rows, 784)), labels % 2 * 2 - 1, rng.normal(size=rows), labels


def every_figure():
    pixels, target, scores, labels = digits()
    x, at = np.arange(1.0, 5), np.linspace(1, 4, 11)
    lines = [(k, at * (2 - 0.85**k * 2)) for k in (0, 1, 2, 4, 8, 16, 32, 64, 100)]
    two = {"train": falling(0.9), "test": falling(0.95)}
    return {
        "loss": figures.loss_curves(two, two, 0.05),
        "loss in one decade": figures.loss_curves({"train": falling(0.99)}, optimum=1e-30),
        "weights": figures.weight_picture(np.linspace(-1, 0.3, 784)),
        "wrong": figures.wrong_digits(pixels, target, scores, labels),
        "accuracy": figures.accuracy_by_digit(np.linspace(0.5, 1, 10), 0.8, 0.51),
        "lines": figures.fitted_lines(x, 2 * x, at, lines),
        "roads": figures.compared_curves({str(i): two for i in range(5)}, two),
    }


@pytest.mark.parametrize("name", every_figure())
def test_no_text_overlaps_another_or_leaves_the_picture(name):
    figure = every_figure()[name]
    FigureCanvasAgg(figure).draw()
    texts = [text for text in _drawn(figure) if text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for legend in figure.legends:  # above the axes, where it hides no curve
        assert all(legend.get_window_extent().y0 >= axes.bbox.y1 for axes in figure.axes)
    width, height = figure.canvas.get_width_height()
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} lies on {other!r}"
    assert min(float(t.get_fontsize()) for t in texts) >= 12  # points: readable at half size


def _drawn(figure):
    """The texts of a drawn figure; matplotlib also holds labels of ticks beyond the limits."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            texts.append(axis.label)
            for tick in axis._update_ticks():
                texts += [label for label in (tick.label1, tick.label2) if label.get_visible()]
    return texts


@pytest.mark.parametrize("name", every_figure())
def test_axes_have_labels_and_colours_are_safe(name):
    for axes in every_figure()[name].axes:
        if axes.axison:
            assert axes.get_ylabel() or axes.get_title() == "test loss"
            assert axes.get_xlabel() or axes.get_label() == "<colorbar>"
    if name != "lines":  # whose shades are those of the map cividis
        colours = {to_hex(line.get_color()) for a in every_figure()[name].axes for line in a.lines}
        assert colours <= OKABE_ITO | {figures.GREY}


def test_losses_are_on_a_log_scale_and_the_optimum_is_a_line():
    axes = figures.loss_curves({"train": falling(0.9)}, optimum=0.1).axes[0]
    assert axes.get_yscale() == "log"
    train, optimum = axes.lines
    np.testing.assert_array_equal(train.get_ydata(), falling(0.9)[1])
    assert np.asarray(optimum.get_ydata()).tolist() == [0.1, 0.1]


def test_losses_of_zero_and_infinity_are_gaps():
    steps, losses = np.arange(4), [1.0, 0.0, np.inf, 0.5]
    drawn = figures.loss_curves({"train": (steps, losses)}).axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, [1, np.nan, np.nan, 0.5])


def test_a_curve_that_explodes_leaves_the_others_readable():
    steady, exploding = {"train": falling(0.9)}, {"train": falling(10.0, 300)}
    low, high = figures.compared_curves({"a": steady, "b": exploding}).axes[0].get_ylim()
    assert low == pytest.approx(30 * 0.9**49 / 2) and high == pytest.approx(30e3)


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


def test_no_wrong_digit_is_a_picture_too():
    pixels, target, _, _ = digits()
    axes = figures.wrong_digits(pixels, target, target * 1.0).axes[0]
    assert axes.get_title().startswith("0 of 60") and not axes.texts


def test_lines_that_coincide_are_drawn_once():
    at = np.array([0.0, 1.0])
    lines = [(0, at * 0), (1, at), (2, at * 1.001), (3, at * 1.002)]
    axes = figures.fitted_lines([0, 1], [0, 1], at, lines).axes[0]
    assert [line.get_label() for line in axes.lines] == [
        "after 0 updates",
        "after 3 updates",
        "data",
    ]


def test_a_memory_thins_long_curves_and_keeps_their_ends():
    memory = CurveMemory(most=100)
    for step in range(1000):
        memory.log_points([(step, {"a": float(step)})])
    steps, values = memory["a"]
    assert len(steps) <= 100 and steps == values
    assert steps[0] == 0 and steps[-1] > 980


def fit(make_trainer, tmp_path, model, data, steps, **settings):
    pictures = Pictures()
    logger = RunLogger(str(tmp_path), "run")
    trainer = make_trainer(max_steps=steps, logger=logger, callbacks=[pictures], **settings)
    trainer.fit(model, datamodule=data)
    events = EventAccumulator(str(logger.log_dir), {"images": 0, "scalars": 0}).Reload()
    folder = tmp_path / "run" / "version_0" / "pictures"
    return pictures, events, {path.stem: imread(path) for path in folder.glob("*.png")}, trainer


@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_a_fit_of_points_draws_curves_and_lines(make_trainer, tmp_path, gradient):
    model = LinearRegression(bias=False, gradient=gradient)
    data = PointsData(passes_per_epoch=20)
    pictures, events, files, trainer = fit(make_trainer, tmp_path, model, data, 20)
    assert set(files) == {"loss", "fit"}
    assert set(events.Tags()["images"]) == {"pictures/loss", "pictures/fit"}
    image = events.Images("pictures/fit")[0]
    assert (image.height, image.width) == files["fit"].shape[:2] and image.step == 20
    assert [updates for updates, _ in pictures._lines] == [0, 1, 2, 4, 8, 16, 20]
    # H = 2/4 Σx² = 15, so each update multiplies the distance from y = 2x by 1 − 0.01·15.
    for updates, line in pictures._lines:
        assert float(line[-1]) == pytest.approx(8 * (1 - 0.85**updates), rel=1e-6)
    assert len(trainer.loggers) == 1  # the memory has left


class Digits(TensorDataModule):
    def load(self):
        pixels, target, _, labels = digits()
        raw, y = torch.tensor(pixels, dtype=torch.uint8), torch.tensor(target).float()
        table = Table(raw, y, 1 / 255, labels=torch.tensor(labels))
        return {"train": table, "test": table}


def test_a_fit_of_digits_draws_weights_and_mistakes(make_trainer, tmp_path):
    data = Digits(batch_size=20)
    _, events, files, _ = fit(make_trainer, tmp_path, ParityRegressor(lr=0.001), data, 6)
    assert set(files) == {"loss", "weights", "wrong_digits", "accuracy_by_digit"}
    assert len(events.Tags()["images"]) == 4
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"train/loss" in layout and b"test/loss" in layout


def test_no_logger_no_pictures(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=3, callbacks=[Pictures()])
    trainer.fit(LinearRegression(), datamodule=PointsData(passes_per_epoch=3))
    assert not list(tmp_path.rglob("*.png"))


def test_figures_need_neither_torch_nor_pyplot_and_the_callback_imports_them_late():
    code = (
        "import sys, lightning_gd.figures; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
    assert "figures" not in vars(lightning_gd.callbacks.pictures)

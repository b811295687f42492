"""The surface of a loss and the path of a run on it: numbers, picture, animation."""

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RandomRows, Rows, events_in, fit, normal, run, trainer_words
from lightning.pytorch import Callback
from matplotlib.image import imread
from PIL import Image
from test_figures import assert_readable

from lightning_gd import LinearRegression, Pictures, PointsData, RunLogger
from lightning_gd.settings import DivergenceError
from lightning_gd.surface import WeightPath
from lightning_gd.surface_figures import surface_figure

MAIN = "main direction of the path"
EXACT = 1e-9  # of differences over a tenth of the path: rounding of 1e-16 of a loss, divided by it


class Huber(LinearRegression):
    def loss(self, x, y):
        return torch.nn.functional.huber_loss(self(x), y)

    def gradients(self, x, y):
        slope = (self(x) - y).clamp(-1, 1)
        return {"weight": slope @ x / len(y), "bias": slope.mean()}


class Watch(Callback):
    """Keeps the path of a run as the pictures do."""

    def on_train_start(self, trainer, pl_module):
        self.path = WeightPath(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.path.add(trainer.global_step)

    def on_fit_end(self, trainer, pl_module):
        self.path.add(trainer.global_step, is_last=True)


def surface_after(make_trainer, data, kind: Any = LinearRegression, steps=80, **settings) -> Any:
    """The surface of a run in float64, the path and the model."""
    watch = Watch()
    trainer = make_trainer(max_steps=steps, callbacks=[watch])
    model = fit(trainer, data, kind, **settings)
    quadratic = kind is LinearRegression
    return watch.path.surface(data.tables["train"], quadratic), watch.path, model


def line_data(**settings):
    return Rows(normal(30, 1, seed=1) + 1, normal(30, seed=2), passes_per_epoch=80, **settings)


def loss_of(model, data, weights):
    """The loss of the model itself at the trained weights given."""
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            weights, [p for p in model.parameters() if p.requires_grad]
        )
        return model.loss(*data.local("train")).item()


@pytest.mark.parametrize("kind", [LinearRegression, Huber])
@pytest.mark.parametrize("features", [1, 3])
def test_the_loss_of_a_point_of_the_plane_is_that_of_the_model(make_trainer, kind, features):
    data = line_data() if features == 1 else RandomRows(passes_per_epoch=80)
    surface, path, model = surface_after(make_trainer, data, kind, num_features=features)
    assert surface.is_whole == (features == 1)
    for point in torch.tensor([[0.0, 0.0], [0.3, -0.2], [-1.0, 0.7]]).double():
        weights = surface.origin + point @ surface.axes
        assert float(surface.at(point)) == pytest.approx(loss_of(model, data, weights), rel=1e-12)
    for losses, weights in zip(surface.losses, surface.points, strict=True):
        assert float(losses) == pytest.approx(loss_of(model, data, weights), rel=1e-12)
    if features == 1:
        assert torch.equal(surface.path, torch.stack(path.weights)) and surface.share == 1
    else:  # the plane passes through the last point, on its positive side
        assert not surface.path[-1].any() and (surface.path.mean(0) <= 0).all()


def test_the_share_of_the_movement_is_that_of_the_first_two_singular_values(make_trainer):
    data = RandomRows(passes_per_epoch=80, updates_per_step=7)
    surface, path, _ = surface_after(make_trainer, data, num_features=3, lr=0.2, momentum=0.5)
    points = torch.stack(path.weights).numpy()
    _, values, axes = np.linalg.svd(points - points.mean(0))
    assert surface.share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), rel=1e-12)
    assert 0.5 < surface.share < 1
    np.testing.assert_allclose(np.abs(surface.axes.numpy() @ axes[:2].T), np.eye(2), atol=1e-12)


@pytest.mark.parametrize("features", [1, 3])
def test_curvatures_and_the_lowest_point_are_those_of_the_moments(make_trainer, features):
    data = line_data() if features == 1 else RandomRows(passes_per_epoch=80)
    surface, _, _ = surface_after(make_trainer, data, num_features=features)
    moments = data.tables["train"].moments()
    hessian = surface.axes @ moments.hessian() @ surface.axes.T
    np.testing.assert_allclose(surface.curvatures, torch.linalg.eigvalsh(hessian), rtol=EXACT)
    turned = surface.directions.T @ hessian @ surface.directions
    np.testing.assert_allclose(turned, torch.diag(surface.curvatures), atol=EXACT)
    # The gradient in the plane vanishes there.
    best = surface.origin + surface.best @ surface.axes
    slope = moments.hessian() @ (best - moments.optimum().theta)
    np.testing.assert_allclose(surface.axes @ slope, 0, atol=EXACT)


def test_the_path_has_the_first_updates_and_few_of_many_later_ones():
    path = WeightPath(LinearRegression())
    for update in range(20_000):
        path.add(update)
    assert path.updates[:67] == [*range(64), 66, 69, 72] and len(path.updates) == len(path.weights)
    # 64, then at most 32 of each doubling; the distances are odd, so that the phase of a
    # path that swings to and fro is not lost.
    assert len(path.updates) <= 64 + 32 * 9
    assert all(b - a in (1, 3, 5, 9, 17, 33, 65, 129, 257, 513) for a, b in within(path.updates))


def within(updates):
    """Pairs of neighbours between two powers of two."""
    pairs = zip(updates, updates[1:], strict=False)
    return [(a, b) for a, b in pairs if a.bit_length() == b.bit_length()]


def test_a_run_that_diverges_is_cut_and_one_that_does_not_move_has_no_surface(make_trainer):
    data = PointsData(passes_per_epoch=80)
    surface, path, _ = surface_after(make_trainer, data, lr=0.13)
    last = surface.shown - 1
    assert 3 < surface.shown < len(path.updates) == 70
    assert surface.losses[last] <= 100 * surface.losses[0]
    assert "updates 0 to 14 of 80" in labels(surface_figure(surface, path.names))
    still, *_ = surface_after(make_trainer, PointsData(x=[0, 0], y=[0, 0]), steps=1)
    assert still is None


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("case", ["bias", "none", "digits", "huber", "diverging"])
def test_the_picture_is_readable(make_trainer, case):
    settings = {"bias": case != "none", "lr": 0.13 if case == "diverging" else 0.1}
    data, kind = PointsData(passes_per_epoch=80), Huber if case == "huber" else LinearRegression
    if case == "digits":
        data, settings = RandomRows(passes_per_epoch=80), {"num_features": 3}
    surface, path, _ = surface_after(make_trainer, data, kind, **settings)
    figure = surface_figure(surface, path.names)
    assert_readable(figure)
    axes = figure.axes[0]
    drawn = next(line for line in axes.lines if str(line.get_label()).startswith("updates"))
    np.testing.assert_array_equal(drawn.get_xdata(), surface.path[:, 0])
    shown = surface.losses if case == "none" else surface.path[:, 1]
    np.testing.assert_array_equal(drawn.get_ydata(), shown)
    (low, high), where = axes.get_xlim(), np.asarray(surface.path[:, 0])
    assert low < where.min() and where.max() < high
    names = {
        "none": ["weight", "loss"],
        "digits": ["main direction of the path", "second direction"],
    }
    assert [axes.get_xlabel(), axes.get_ylabel()] == names.get(case, ["weight", "bias"])


@pytest.mark.parametrize("lr", [0.1, 0.5], ids=["converges", "diverges"])
@pytest.mark.parametrize("gradient", ["explicit", "autograd"])
def test_the_animation_is_small_and_the_same_in_tensorboard(make_trainer, tmp_path, lr, gradient):
    data, model = PointsData(passes_per_epoch=300), LinearRegression(lr=lr, gradient=gradient)
    trainer_ends = pytest.raises(DivergenceError) if lr == 0.5 else contextlib.nullcontext()
    logger = RunLogger(str(tmp_path), "run")
    trainer = make_trainer(max_steps=300, logger=logger, callbacks=[Pictures(animation=True)])
    with trainer_ends:
        trainer.fit(model, datamodule=data)
    folder, events = tmp_path / "run" / "version_0" / "pictures", events_in(logger.log_dir)
    for name in ("animation.gif", "surface.png"):
        (image,) = events.Images(f"pictures/{name[:-4]}")
        assert image.encoded_image_string == (folder / name).read_bytes()
    with Image.open(folder / "animation.gif") as gif:
        frames: Any = gif
        assert (image.width, image.height) == (1200, 900)
        assert 3 <= frames.n_frames <= 40 and frames.info["loop"] == 0
    assert (folder / "animation.gif").stat().st_size < 3e6


def test_the_fit_moves_with_the_path(make_trainer):
    data = PointsData(passes_per_epoch=80)
    surface, path, model = surface_after(make_trainer, data, lr=0.1)
    x = torch.tensor([[1.0], [4.0]])
    for weights, line in zip(surface.points, path.predictions(surface.points, x), strict=True):
        expected = weights[0] * x[:, 0].double() + weights[1]
        np.testing.assert_allclose(line, expected, rtol=1e-6)  # the line is in float32


LINE = ["--config", "linear", "--model.bias", "true", "--model.lr", "0.1"]


def test_a_resumed_run_shows_the_whole_path(tmp_path, monkeypatch):
    drawn, where = [], trainer_words(default_root_dir=tmp_path)

    def kept(*words):
        drawn.append(surface_figure(*words))
        return drawn[-1]

    monkeypatch.setattr("lightning_gd.surface_figures.surface_figure", kept)
    assert run("fit", *LINE, *where, "--trainer.max_steps", "40")[0] == 0
    assert run("fit", *LINE, *where, "--trainer.max_steps", "60", "--ckpt_path", "last")[0] == 0
    assert [labels(figure)[3] for figure in drawn] == ["updates 0 to 40", "updates 0 to 60"]


@pytest.mark.slow
def test_two_processes_draw_once_and_the_loss_of_the_rows_of_both(forge, tmp_path):
    pictures = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        many = {"accelerator": "cpu", "strategy": "ddp", "devices": devices}
        words = trainer_words(**many, default_root_dir=folder)
        rows = ["--data.x", "[1, 2, 3]", "--data.y", "[2, 4, 5]", "--pictures.animation", "true"]
        statuses, output = forge.run(["fit", *LINE, *rows, *words], world=devices)
        assert statuses == [0] * devices, output
        names = {file.name for file in folder.rglob("pictures/*")}
        assert names == {"loss.png", "fit.png", "surface.png", "animation.gif"}
        pictures += [imread(file) for file in folder.rglob("surface.png")]
    # Weights differ by roundings of float32, which change the shades at the edges of a few lines.
    assert (np.abs(pictures[0] - pictures[1]) > 2 / 255).mean() < 1e-4


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(ValueError, match="surface='yes' must be 'auto' or True or False"):
        Pictures(surface="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="surface=False must be 'auto' or True .animation=True"):
        Pictures(surface=False, animation=True)
    words = ["--config", "parity_mlp", "--pictures.surface", "true"]
    status, _, err = run(*words, *trainer_words(default_root_dir=tmp_path, max_steps=1))
    assert status == 2 and re.search(r"at most 65,536 trained numbers \(got 804,865\)", err)

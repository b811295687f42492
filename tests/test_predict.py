"""Pictures of digits: their form, the answers of a model, and what cannot be read."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from test_cli import LIGHTNINGS

import lightning_gd
from lightning_gd import (
    LinearRegression,
    LogisticParity,
    MNISTParityData,
    ParityMLP,
    ParityRegressor,
    PointsData,
)
from lightning_gd.images import mnist_form, read_digit
from lightning_gd.scoring import scorer

SCRIPT = Path(lightning_gd.__file__).parents[1] / "scripts" / "predict.py"
MOST_LOST = 0.01  # accuracy below that of the test digits themselves
pytestmark = pytest.mark.filterwarnings(LIGHTNINGS)


def train(folder, model, updates, **data):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=updates,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rows = MNISTParityData(test_every=0, **data) if model.hparams["num_features"] > 1 else None
    trainer.fit(model, datamodule=rows or PointsData(passes_per_epoch=updates))
    path = folder / f"{type(model).__name__}.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = ParityRegressor(lr=0.002, moments=True)
    return train(tmp_path_factory.mktemp("run"), model, 500, passes_per_epoch=500)


@pytest.fixture(scope="module")
def digits():
    data = MNISTParityData()
    data.setup()
    test = data.tables["test"]
    return test.raw.numpy().reshape(-1, 28, 28), (test.y > 0).numpy()


@pytest.fixture(scope="module")
def predict():
    """The `main` of the script."""
    names = {"__name__": "predict"}
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), names)
    return names["main"]


def drawn(digit, side, canvas=1.4, ink=255, paper=0, seed=0):
    """The digit as a picture `side` pixels wide, anywhere on a larger one."""
    rng = np.random.default_rng(seed)
    big = np.zeros((int(side * canvas), int(side * (canvas + 0.2))))
    top, left = (rng.integers(0, room - side + 1) for room in big.shape)
    scaled = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    big[top : top + side, left : left + side] = np.asarray(scaled) / 255
    return Image.fromarray(np.round(paper + big * (ink - paper)).astype(np.uint8))


def saved(image, kind, **settings):
    """The picture as a file of this kind holds it."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    file.seek(0)
    return Image.open(file)


# The form


def test_a_digit_of_mnist_keeps_its_place_and_its_greys(digits):
    kept = 0
    for digit in digits[0][:200]:
        difference = np.abs(mnist_form(Image.fromarray(digit)).astype(int) - digit)
        # Greys are stretched to 255 from the 254 or 253 that some digits end at; an edge that is
        # fainter than 32 all along is taken for paper.
        kept += difference.max() <= 32 and difference.mean() < 1
    assert kept >= 198  # a mass on the border of two pixels may fall on the other side


@pytest.mark.parametrize("side", [40, 120, 500])
@pytest.mark.parametrize("ink, paper", [(255, 0), (0, 255), (60, 180), (200, 90)])
def test_the_box_has_20_pixels_and_the_mass_is_in_the_middle(digits, side, ink, paper):
    for seed, digit in enumerate(digits[0][:3]):
        found = mnist_form(drawn(digit, side, ink=ink, paper=paper, seed=seed)).astype(float)
        rows, columns = (np.flatnonzero(found.any(axis)) for axis in (1, 0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
        at = np.arange(28) + 0.5
        for mass in (found.sum(1), found.sum(0)):
            assert 14 <= mass @ at / mass.sum() < 15  # as those of MNIST, to whole pixels
        assert found.max() == 255


def test_dark_light_coloured_and_transparent_give_the_same(digits):
    digit = digits[0][3]
    plain = mnist_form(Image.fromarray(digit))
    inverse = Image.fromarray(255 - digit)
    share = digit[..., None] / 255
    colours = (1 - share) * [90, 200, 90] + share * [235, 55, 90]  # of one brightness
    clear = np.zeros((28, 28, 4), np.uint8)
    clear[..., 3] = digit  # black ink
    white = clear.copy()
    white[..., :3] = 255
    sticker = Image.new("RGBA", (60, 70))
    sticker.paste(inverse.convert("RGBA"), (9, 30))
    same = {
        "dark on light": inverse,
        "16 bits": Image.fromarray(digit.astype(np.uint16) * 257),
        "32 bits": Image.fromarray(digit.astype(np.int32) * 1000),
        "floats": Image.fromarray(digit.astype(np.float32) / 255),
        "palette": inverse.convert("P"),
        "grey with alpha": inverse.convert("LA"),
        "four inks": inverse.convert("CMYK"),
        "black on nothing": Image.fromarray(clear),
        "white on nothing": Image.fromarray(white),
        "paper on nothing": sticker,
        "gif": saved(inverse, "GIF"),
        "webp": saved(inverse, "WEBP", lossless=True),
    }
    for name, image in same.items():
        assert np.array_equal(mnist_form(image), plain), name
    found = mnist_form(Image.fromarray(np.round(colours).astype(np.uint8))).astype(int)
    assert np.abs(found - plain).max() <= 2  # 145 steps from paper to ink instead of 255


def test_a_photograph_is_turned_as_the_camera_was_held(digits, tmp_path):
    upright = drawn(digits[0][3], 200, ink=0, paper=255)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: turn by 270° to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    found = read_digit(tmp_path / "turned.png")
    assert np.array_equal(found, mnist_form(upright))


@pytest.mark.parametrize("image", [
    Image.new("L", (50, 40), 200),
    Image.new("L", (1, 1), 0),
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)),
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30) % 20 + 100),
])  # fmt: skip
def test_a_picture_without_a_digit_is_refused(image):
    with pytest.raises(ValueError, match="no digit is seen"):
        mnist_form(image)


# The answers


def test_the_scores_of_mnist_digits_are_those_of_the_model(checkpoint, digits):
    data = MNISTParityData()
    data.setup()
    model = ParityRegressor.load_from_checkpoint(checkpoint, weights_only=True)
    with torch.no_grad():
        expected = model(data.tables["test"].x)
    scores = scorer(checkpoint)(list(digits[0]))
    # 784 float32 products, in another order.
    assert scores == pytest.approx(expected.tolist(), abs=2e-5)


NOISE = np.random.default_rng(1)
CASES = {
    "itself": lambda d, i: Image.fromarray(d),
    "20 pixels": lambda d, i: drawn(d, 20, seed=i),
    "40 pixels, inverted": lambda d, i: drawn(d, 40, ink=0, paper=255, seed=i),
    "56 pixels": lambda d, i: drawn(d, 56, seed=i),
    "80 pixels, faint": lambda d, i: drawn(d, 80, ink=120, paper=200, seed=i),
    "80 pixels, jpeg": lambda d, i: saved(drawn(d, 80, ink=0, paper=255, seed=i), "JPEG"),
    "56 pixels, grain": lambda d, i: Image.fromarray(
        np.clip(
            np.asarray(drawn(d, 56, ink=40, paper=210, seed=i)) + NOISE.normal(0, 6, (78, 89)),
            0,
            255,
        ).astype(np.uint8)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_answered_as_well_as_the_test_digits(checkpoint, digits, case):
    pixels, odd = digits[0][:1000], digits[1][:1000]
    score = scorer(checkpoint)
    itself = (np.array(score(list(pixels))) > 0) == odd
    forms = [mnist_form(CASES[case](digit, i)) for i, digit in enumerate(pixels)]
    lost = itself.mean() - ((np.array(score(forms)) > 0) == odd).mean()
    # Fewer pixels than MNIST's hold less: twice the loss is granted.
    assert lost <= (2 * MOST_LOST if case == "20 pixels" else MOST_LOST)


@pytest.mark.parametrize(
    "model, scaling",
    [(LogisticParity(lr=0.05), "unit"), (ParityMLP(hidden=16, loss="logistic"), "symmetric")],
)
def test_every_model_of_digits_is_scored_with_its_own_scaling(tmp_path, digits, model, scaling):
    path = train(tmp_path, model, 30, scaling=scaling, batch_size=64)
    pixel = torch.from_numpy(digits[0][:50]).float() / 255
    x = pixel if scaling == "unit" else (pixel - 0.5) / 0.5
    with torch.no_grad():
        expected = model(x.flatten(1)).tolist()
    assert scorer(path)(list(digits[0][:50])) == pytest.approx(expected, abs=2e-5)


# The command


@pytest.fixture
def folder(tmp_path, digits):
    """A folder with two good pictures, a broken one and a text."""
    good = tmp_path / "pictures"
    good.mkdir()
    for name, digit in (("b.png", digits[0][3]), ("c.BMP", 255 - digits[0][4])):
        Image.fromarray(digit).save(good / name)
    (good / "a.jpg").write_text("no picture")
    (good / "notes.txt").write_text("not looked at")
    return good


def test_a_folder_is_answered_and_a_broken_file_is_named(
    predict, checkpoint, folder, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert predict(["--checkpoint", checkpoint, str(folder)]) == 1
    out, err = capsys.readouterr()
    assert f"error: {folder / 'a.jpg'}: cannot identify image file" in err and "notes" not in err
    score = scorer(checkpoint)([read_digit(folder / "b.png")])[0]
    for name in ("b.png", "c.BMP"):
        assert str(folder / name) in out
    assert f"{score:+.4f}" in out and f"{abs(score):.4f}" in out and "notes" not in out


def test_json_is_for_machines(predict, checkpoint, folder, capsys):
    files = [str(folder / name) for name in ("c.BMP", "b.png", "none.png")]
    assert predict(["--json", "--checkpoint", checkpoint, *files]) == 1
    answers = json.loads(capsys.readouterr().out)
    assert [answer["file"] for answer in answers] == files
    assert "No such file" in answers[2]["error"] and "score" not in answers[2]
    for answer in answers[:2]:
        assert answer["margin"] == abs(answer["score"])
        assert answer["answer"] == ("odd" if answer["score"] > 0 else "even")
    assert predict(["--json", "--checkpoint", checkpoint, *files[:2]]) == 0


def test_damaged_files_are_named(predict, checkpoint, folder, capsys):
    whole = (folder / "b.png").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for name, data in (("cut", whole[:100]), ("flipped", bytes(flipped)), ("empty", b"")):
        (folder / f"{name}.png").write_bytes(data)
        assert predict(["--checkpoint", checkpoint, str(folder / f"{name}.png")]) == 1
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {folder / name}.png: ") and err.count("\n") == 1 and not out


def test_what_is_no_checkpoint_of_digits_is_refused(predict, tmp_path, folder, capsys):
    points = train(tmp_path, LinearRegression(num_features=1), 5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("text")
    for words, status, message in (
        ([points, folder], 2, "LinearRegression with num_features=1"),
        ([tmp_path / "none.ckpt", folder], 1, "none.ckpt: there is no such file"),
        ([tmp_path / "text.ckpt", folder], 2, "it is damaged, cut off, or no checkpoint at all"),
        (["https://example.org/a.ckpt", folder], 2, "is a URL: only local files"),
        ([points, tmp_path / "empty"], 2, "empty holds no picture"),
    ):
        assert predict(["--checkpoint", *map(str, words)]) == status
        assert message in capsys.readouterr().err

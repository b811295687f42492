"""Pictures of digits: their form, the answers of a model, and what cannot be read."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from digits.images import mnist_form, read_digit
from digits.scoring import scorer
from lightning_gd import LogisticParity, MNISTParityData, ParityMLP, ParityRegressor, PointsData
from quiet import quiet_trainer

MOST_LOST = 0.01  # accuracy below that of the test digits themselves


def train(path, model, updates, data):
    trainer = quiet_trainer(updates, False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    data = MNISTParityData(moments=True, passes_per_epoch=500, updates_per_step=50)
    return train(tmp_path_factory.mktemp("run") / "m.ckpt", ParityRegressor(lr=0.002), 500, data)


@pytest.fixture(scope="module")
def digits():
    data = MNISTParityData()
    data.setup()
    test = data.tables["test"]
    return test.raw.numpy().reshape(-1, 28, 28), (test.y > 0).numpy()


def drawn(digit, side, ink=255, paper=0, seed=0):
    """The digit as a picture `side` pixels wide, anywhere on a larger one."""
    rng = np.random.default_rng(seed)
    big = np.zeros((int(side * 1.4), int(side * 1.6)))
    top, left = (rng.integers(0, length - side + 1) for length in big.shape)
    scaled = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    big[top : top + side, left : left + side] = np.asarray(scaled) / 255
    return Image.fromarray(np.round(paper + big * (ink - paper)).astype(np.uint8))


def saved(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    file.seek(0)
    return Image.open(file)


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
        found = mnist_form(drawn(digit, side, ink, paper, seed)).astype(float)
        rows, columns = (np.flatnonzero(found.any(axis)) for axis in (1, 0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20 and found.max() == 255
        for mass in (found.sum(1), found.sum(0)):
            assert 14 <= mass @ (np.arange(28) + 0.5) / mass.sum() < 15  # as MNIST's, whole pixels


def test_dark_light_coloured_and_transparent_give_the_same(digits):
    digit = digits[0][3]
    plain, inverse = mnist_form(Image.fromarray(digit)), Image.fromarray(255 - digit)
    clear = np.zeros((28, 28, 4), np.uint8)
    clear[..., 3] = digit  # black ink
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
        "white on nothing": Image.fromarray(clear + np.array([255, 255, 255, 0], np.uint8)),
        "paper on nothing": sticker,
        "gif": saved(inverse, "GIF"),
        "webp": saved(inverse, "WEBP", lossless=True),
    }
    for name, image in same.items():
        assert np.array_equal(mnist_form(image), plain), name
    ink = digit[..., None] / 255
    colours = np.round((1 - ink) * [90, 200, 90] + ink * [235, 55, 90])  # of one brightness
    found = mnist_form(Image.fromarray(colours.astype(np.uint8))).astype(int)
    assert np.abs(found - plain).max() <= 2  # 145 steps from paper to ink instead of 255


def test_a_photograph_is_turned_as_the_camera_was_held(digits, tmp_path):
    upright = drawn(digits[0][3], 200, ink=0, paper=255)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: turn by 270° to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_digit(tmp_path / "turned.png"), mnist_form(upright))


def test_a_picture_without_a_digit_is_refused():
    texture = np.arange(900, dtype=np.uint8).reshape(30, 30) % 20 + 100
    blank = [Image.new("L", (50, 40), 200), Image.new("L", (1, 1), 0), Image.new("RGBA", (9, 9))]
    for image in [*blank, Image.fromarray(texture)]:
        with pytest.raises(ValueError, match="no digit is seen"):
            mnist_form(image)


CASES = {
    "itself": lambda d, i: Image.fromarray(d),
    "20 pixels": lambda d, i: drawn(d, 20, seed=i),
    "40 pixels, inverted": lambda d, i: drawn(d, 40, 0, 255, i),
    "56 pixels": lambda d, i: drawn(d, 56, seed=i),
    "80 pixels, faint": lambda d, i: drawn(d, 80, 120, 200, i),
    "80 pixels, jpeg": lambda d, i: saved(drawn(d, 80, 0, 255, i), "JPEG"),
    "56 pixels, grain": lambda d, i: grained(drawn(d, 56, 40, 210, i), i),
}


def grained(image, seed):
    noise = np.random.default_rng(seed).normal(0, 6, np.asarray(image).shape)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def test_pictures_are_answered_as_well_as_the_test_digits(checkpoint, digits):
    pixels, odd = digits[0][:300], digits[1][:300]
    score = scorer(checkpoint)
    itself = ((np.array(score(list(pixels))) > 0) == odd).mean()
    for case, draw in CASES.items():
        forms = [mnist_form(draw(digit, i)) for i, digit in enumerate(pixels)]
        lost = itself - ((np.array(score(forms)) > 0) == odd).mean()
        # Fewer pixels than MNIST's hold less: twice the loss is granted.
        assert lost <= (2 * MOST_LOST if case == "20 pixels" else MOST_LOST), case


MODELS = {
    "standard": ParityRegressor(lr=0.002),
    "unit": LogisticParity(lr=0.05),
    "symmetric": ParityMLP(hidden=16, loss="logistic"),
}


@pytest.mark.parametrize("scaling", MODELS)
def test_every_model_of_digits_is_scored_with_its_own_scaling(tmp_path, digits, scaling):
    model, data = MODELS[scaling], MNISTParityData(scaling=scaling, batch_size=64)
    path = train(tmp_path / "m.ckpt", model, 30, data)
    with torch.no_grad():
        expected = model(data.tables["test"].x[:50]).tolist()
    # 784 float32 products, in another order.
    assert scorer(path)(list(digits[0][:50])) == pytest.approx(expected, abs=2e-5)


@pytest.fixture
def folder(tmp_path, digits):
    """A folder with two good pictures, three damaged ones and a text."""
    good = tmp_path / "pictures"
    good.mkdir()
    for name, digit in (("b[red].png", digits[0][3]), ("c.BMP", 255 - digits[0][4])):
        Image.fromarray(digit).save(good / name)
    whole = (good / "b[red].png").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for name, data in (("cut", whole[:100]), ("flipped", flipped), ("empty", b"")):
        (good / f"{name}.png").write_bytes(data)
    (good / "a.jpg").write_text("no picture")
    (good / "notes.txt").write_text("not looked at")
    return good


def test_a_folder_is_answered_and_damaged_files_are_named(checkpoint, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert predict.main(["--checkpoint", checkpoint, str(folder)]) == 1
    out, err = capsys.readouterr()
    named = [line.partition(".")[0] for line in err.splitlines()]
    assert named == [f"error: {folder / name}" for name in ("a", "cut", "empty", "flipped")]
    assert "notes" not in out
    score = scorer(checkpoint)([read_digit(folder / "b[red].png")])[0]
    for text in (folder / "b[red].png", folder / "c.BMP", f"{score:+.4f}", f"{abs(score):.4f}"):
        assert str(text) in out


def test_json_is_for_machines(checkpoint, folder, capsys):
    files = [str(folder / name) for name in ("c.BMP", "b[red].png", "none.png")]
    assert predict.main(["--json", "--checkpoint", checkpoint, *files]) == 1
    answers = json.loads(capsys.readouterr().out)
    assert [answer["file"] for answer in answers] == files
    assert "No such file" in answers[2]["error"] and "score" not in answers[2]
    for answer in answers[:2]:
        assert answer["margin"] == abs(answer["score"])
        assert answer["answer"] == ("odd" if answer["score"] > 0 else "even")
    assert predict.main(["--json", "--checkpoint", checkpoint, *files[:2]]) == 0


def test_weights_that_are_not_finite_answer_nothing(tmp_path, folder, capsys):
    broken = ParityRegressor(intercept=1.0)
    torch.nn.init.constant_(broken.weight, float("nan"))
    path = train(tmp_path / "m.ckpt", broken, 0, MNISTParityData())
    assert predict.main(["--checkpoint", str(path), str(folder)]) == 2
    assert "m.ckpt: weight holds numbers that are not finite" in capsys.readouterr().err


def test_what_is_no_checkpoint_of_digits_is_refused(tmp_path, folder, capsys):
    narrow = train(tmp_path / "m.ckpt", ParityRegressor(num_features=1), 1, PointsData())
    (tmp_path / "empty").mkdir()
    for words, status, message in (
        ([narrow, folder], 2, "ParityRegressor with num_features=1"),
        ([tmp_path / "none.ckpt", folder], 1, "none.ckpt: there is no such file"),
        ([folder / "notes.txt", folder], 2, "it is damaged, cut off, or no checkpoint at all"),
        (["https://example.org/a.ckpt", folder], 2, "is a URL: only local files"),
        ([narrow, tmp_path / "empty"], 2, "empty holds no picture"),
    ):
        assert predict.main(["--checkpoint", *map(str, words)]) == status
        assert message in capsys.readouterr().err

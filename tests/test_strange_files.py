"""Tables, pictures and settings of strangers: the very numbers, or one line, in bounded memory."""

import gzip
import io
import os
import random
import re
import resource
import zlib

import numpy as np
import pytest
from conftest import counted
from PIL import Image

from digits.images import mnist_form, read_digit
from lightning_gd.cli import UsageError, resolve
from lightning_gd.data.table import TableData

ANSWERED = "strange files answered"
ROWS = "a,b,y\n1,2,3\n4,5,7\n7,9,9\n2,2,1\n3,8,2\n"
NUMBERS = [[1, 2, 3], [4, 5, 7], [7, 9, 9], [2, 2, 1], [3, 8, 2]]


@pytest.fixture(autouse=True)
def bounded():
    """At most 3 GB more than now."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# Tables


def text(content, encoding="utf-8"):
    return lambda file: file.write_bytes(content.encode(encoding))


def sparse(size, start=b""):
    def write(file):
        file.write_bytes(start)
        os.truncate(file, size)

    return write


def wide(columns):
    names = ",".join([*(f"c{i}" for i in range(columns)), "y"])
    return text("\n".join([names, *(",".join(["1"] * columns + [str(i)]) for i in range(3))]))


def large(file):
    """2 GB of numbers."""
    block = "".join(f"{i},{i % 7}\n" for i in range(10**6)).encode()
    with file.open("wb") as opened:
        opened.write(b"a,y\n")
        while opened.tell() < 2 * 10**9:
            opened.write(block)


GOOD = {  # the rows of NUMBERS in other forms
    "byte order mark": text("\ufeff" + ROWS),
    "CRLF": text(ROWS.replace("\n", "\r\n")),
    "old Macs": text(ROWS.replace("\n", "\r")),
    "quotes": text('"a","b","y"\n"1","2","3"\n' + ROWS.partition("2,3\n")[2]),
    "no last line end": text(ROWS.rstrip()),
    "signs and exponents": text(ROWS.replace("4,5,7", "+4,5e0,.7e1")),
    "spaces after commas": text(ROWS.replace(",", ", ")),
    "empty lines": text(ROWS.replace("\n", "\n\n")),
    "a link": lambda file: (file.with_name("b").write_text(ROWS), file.symlink_to("b")),
}


@pytest.mark.parametrize("name", GOOD)
def test_forms_of_a_table(tmp_path, name):
    GOOD[name](tmp_path / "t.csv")
    with counted(ANSWERED):
        data = TableData(str(tmp_path / "t.csv"), "y", test_fraction=0.0)
        x, y, _ = data.read(data.path)
        assert np.column_stack([x, y]).tolist() == NUMBERS


BAD = {  # how each is written, and what is said
    "UTF-16": (text(ROWS, "utf-16"), "not a text file in UTF-8"),
    "UTF-32": (text(ROWS, "utf-32"), "not a text file in UTF-8"),
    "Latin-1": (text("é,y\n1,2\n", "latin-1"), "not a text file in UTF-8"),
    "Latin-1 below": (text("a,y\n1,2\né,3\n", "latin-1"), "not a text file in UTF-8"),
    "gzip": (lambda file: file.write_bytes(gzip.compress(ROWS.encode())), "not a text file"),
    "PNG": (lambda file: Image.new("L", (9, 9)).save(file, "png"), "not a text file"),
    "ELF": (lambda file: file.write_bytes(b"\x7fELF\xff\xfe\0\0"), "not a text file"),
    "nothing": (text(""), "has no header"),
    "one line end": (text("\n"), "has no header"),
    "only a header": (text("a,y\n"), "has a header and no rows"),
    "only empty cells": (text("a,y\n,\n,\n"), "has a header and no rows"),
    "same names": (text("a,a,y\n1,2,3\n"), "line 1: 2 columns are named 'a'"),
    "no names": (text(",,\n1,2,3\n"), "has no column 'y'"),
    "numbers for names": (text("1,2,3\n4,5,6\n"), "has no column 'y': its columns: 1, 2, 3"),
    "semicolons": (text(ROWS.replace(",", ";")), "is --data.separator right?"),
    "tabs": (text(ROWS.replace(",", "\t")), "is --data.separator right?"),
    "decimal commas": (text('a,y\n"1,5",2\n3,4\n'), "line 2, column 'a': '1,5' is not a finite"),
    "thousands": (text('a,y\n"1,000",2\n3,4\n'), "line 2, column 'a': '1,000' is not a finite"),
    "formula": (text("a,y\n=1+1,2\n3,4\n"), "line 2, column 'a': '=1+1' is not a finite number"),
    "percent": (text("a,y\n5%,2\n3,4\n"), "'5%' is not a finite number"),
    "money": (text("a,y\n1,2\n3,$4\n"), "line 3, column 'y': '$4' is not a finite number"),
    "date": (text("a,y\n2020-01-01,2\n3,4\n"), "'2020-01-01' is not a finite number"),
    "hexadecimal": (text("a,y\n1,2\n3,0xg\n"), "'0xg' is not a finite number"),
    "complex": (text("a,y\n1j,2\n3,4\n"), "'1j' is not a finite number"),
    "infinity": (text("a,y\ninf,2\n3,4\n"), "line 2, column 'a': 'inf' is not a finite number"),
    "1e308": (text("a,y\n1e308,2\n3,4\n"), "line 2, column 'a': '1e+308' is not a finite number"),
    "1e999": (text("a,y\n1,2\n3,1e999\n"), "is not a finite number below 1e+150"),
    "null byte": (text("a,y\n1\0,2\n3,4\n"), "t.csv holds a byte 0: it is not a text file"),
    "mixed below": (text("a,y\n" + "1,2\n" * 999 + "x,2\n"), "line 1001, column 'a': 'x'"),
    "ragged": (text("a,y\n1,2\n3,4,5\n"), "cannot be read as a table"),
    "long from the start": (text("a,y\n1,2,3\n4,5,6\n"), "cannot be read as a table"),
    "open quotes": (text('a,y\n"1,2\n3,4\n'), "t.csv"),
    "open quotes above": (text('"a,y\n1,2\n3,4\n'), "has no column 'y'"),
    "10 GB of nothing": (sparse(10 * 2**30), "not a text file in UTF-8"),
    "a cell of 200 kB": (text("a" * 200_000 + ",y\n1,2\n"), "field larger than field limit"),
    "pipe": (lambda file: os.mkfifo(file), "a folder, a pipe or a device"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "a folder, a pipe or a device"),
    "folder": (lambda file: file.mkdir(), "a folder, a pipe or a device"),
    "link to nothing": (lambda file: file.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda file: file.symlink_to("t.csv"), "t.csv"),
    "10⁵ columns": (wide(10**5), "has no column 'z': its columns: c0, c1"),
    "2 GB": (large, "does not fit into memory: write it as Parquet, which is read in parts"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "2 GB")) for name in BAD]
)
def test_what_is_no_table(tmp_path, name):
    write, message = BAD[name]
    write(tmp_path / "t.csv")
    with counted(ANSWERED), pytest.raises((ValueError, OSError)) as error:
        TableData(str(tmp_path / "t.csv"), "z" if "'z'" in message else "y").setup()
    said = str(error.value)
    assert message in said and "t.csv" in said and "\n" not in said and len(said) < 1000, said


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/t.csv", "s3://a/t.csv", "~/none.csv"])
def test_what_is_no_local_path(path):
    with counted(ANSWERED), pytest.raises(OSError, match=re.escape(path)):
        TableData(path, "y")


@pytest.mark.filterwarnings("ignore::pandas.errors.PerformanceWarning")
def test_10_000_columns_are_read_at_once(tmp_path):
    wide(10**4)(tmp_path / "t.csv")
    with counted(ANSWERED):
        x, y, _ = TableData(str(tmp_path / "t.csv"), "y").read(str(tmp_path / "t.csv"))
        assert x.shape == (3, 10**4) and x.eq(1).all() and y.tolist() == [0, 1, 2]


# Pictures


DIGIT = np.zeros((40, 40), np.uint8)
DIGIT[10:30, 15:22] = 255
PLAIN = Image.fromarray(DIGIT)


def saved(image, kind, **settings):
    return lambda file: image.save(file, kind, **settings)


def exif(turns):
    picture = PLAIN.rotate(90, expand=True).getexif()
    picture[0x0112] = turns
    return picture


SAME = {  # pictures of the same digit
    "animated GIF": saved(PLAIN, "GIF", save_all=True, append_images=[Image.new("L", (40, 40))]),
    "animated PNG": saved(PLAIN, "PNG", save_all=True, append_images=[Image.new("L", (40, 40))]),
    "pages of TIFF": saved(PLAIN, "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]),
    "CMYK": saved(Image.fromarray(255 - DIGIT).convert("CMYK"), "TIFF"),
    "16 bits": saved(Image.fromarray(DIGIT.astype(np.uint16) * 257), "PNG"),
    "32 bits": saved(Image.fromarray(DIGIT.astype(np.int32) * 9999), "TIFF"),
    "floats": saved(Image.fromarray(DIGIT.astype(np.float32) / 1e9), "TIFF"),
    "one bit": saved(PLAIN.convert("1"), "PNG"),
    "palette": saved(PLAIN.convert("P"), "GIF"),
    "RGBA": saved(PLAIN.convert("RGBA"), "WEBP", lossless=True),
    "upright by EXIF": saved(PLAIN.rotate(90), "PNG", exif=exif(6)),
    "no ending": saved(PLAIN, "BMP"),
}


@pytest.mark.parametrize("name", SAME)
def test_forms_of_a_picture(tmp_path, name):
    SAME[name](tmp_path / "digit")
    with counted(ANSWERED):
        assert np.array_equal(read_digit(tmp_path / "digit"), mnist_form(PLAIN))


def head(width, height):
    """A PNG that says it is this large, and ends."""
    file = io.BytesIO()
    Image.new("1", (width, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[20:24] = height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return lambda file: file.write_bytes(content)


def cut(image, kind, part):
    def write(file):
        image.save(file, kind)
        os.truncate(file, int(file.stat().st_size * part))

    return write


NOT_READ = "cannot identify image file"
NO_PICTURE = {
    "nothing": (lambda file: file.touch(), NOT_READ),
    "text": (text("no picture"), NOT_READ),
    "SVG": (text('<svg xmlns="http://www.w3.org/2000/svg"/>'), NOT_READ),
    "PDF": (text("%PDF-1.7"), NOT_READ),
    "EPS": (saved(PLAIN.convert("RGB"), "EPS"), "EPS is a program, which Ghostscript would run"),
    "1 × 1": (saved(Image.new("L", (1, 1)), "PNG"), "no digit is seen"),
    "1 × 9999": (saved(Image.new("L", (1, 9999)), "PNG"), "no digit is seen"),
    "transparent": (saved(Image.new("RGBA", (9, 9)), "PNG"), "no digit is seen"),
    "13,000²": (head(13_000, 13_000), "the picture is too large: it may have 89,478,485 pixels"),
    "20,000²": (head(20_000, 20_000), "the picture is too large: it may have 89,478,485 pixels"),
    "not a number": (
        saved(Image.fromarray(np.full((9, 9), np.inf, np.float32)), "TIFF"),
        "that are not finite",
    ),
    "a cut PNG": (cut(PLAIN, "PNG", 0.5), ""),
    "a cut JPEG": (cut(PLAIN, "JPEG", 0.9), "truncated"),
    "a cut TIFF": (cut(PLAIN, "TIFF", 0.9), ""),
    "10 GB of nothing": (sparse(10 * 2**30), NOT_READ),
    "pipe": (lambda file: os.mkfifo(file), "a folder, a pipe or a device"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "a folder, a pipe or a device"),
    "folder": (lambda file: file.mkdir(), "a folder, a pipe or a device"),
    "link to itself": (lambda file: file.symlink_to("digit"), "digit"),
}


@pytest.mark.parametrize("name", NO_PICTURE)
def test_what_is_no_picture(tmp_path, name):
    write, message = NO_PICTURE[name]
    write(tmp_path / "digit")
    with counted(ANSWERED), pytest.raises((ValueError, OSError)) as error:
        read_digit(tmp_path / "digit")
    assert message in str(error.value) and "\n" not in str(error.value)


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_are_read_or_refused(tmp_path, kind):
    file, dice = io.BytesIO(), random.Random(kind)
    PLAIN.save(file, kind)
    for _ in range(10):
        content = bytearray(file.getvalue())
        for _ in range(3):
            content[dice.randrange(min(200, len(content)))] = dice.randrange(256)
        (tmp_path / "digit").write_bytes(content)
        with counted(ANSWERED):
            try:
                assert read_digit(tmp_path / "digit").shape == (28, 28)
            except (ValueError, OSError) as error:
                assert "\n" not in str(error)


# Settings


def laughs(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return text("\n".join(lines))


YAML = {
    "a billion laughs": (laughs(9), "holds more than 10,000,000 values where its * stand"),
    "a circle": (text("a: &a [1, *a]"), "holds more than 10,000,000 values where its * stand"),
    "no anchor": (text("a: *b"), "is not YAML: found undefined alias"),
    "depth": (text("a: " + "[" * 999), "is not YAML: "),
    "a date": (text("a: 2020-99-99"), "is not YAML: "),
    "a Python object": (text("a: !!python/object/apply:os.system [id]"), "is not YAML: could not"),
    "10 GB": (sparse(10 * 2**30, b"a: 1\n"), "is larger than 10,000,000 bytes"),
    "pipe": (lambda file: os.mkfifo(file), "there is no such file"),
    "folder": (lambda file: file.mkdir(), "there is no such file"),
    "Latin-1": (text("a: 1\x9f", "latin-1"), "is not YAML: 'utf-8' codec"),
}


@pytest.mark.parametrize("name", YAML)
def test_what_is_no_configuration(tmp_path, name):
    write, message = YAML[name]
    write(tmp_path / "c.yaml")
    with counted(ANSWERED):
        with pytest.raises(UsageError) as error:
            resolve(["--config", str(tmp_path / "c.yaml")])
        assert message in str(error.value) and "\n" not in str(error.value)

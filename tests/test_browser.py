"""What a run leaves behind is seen in TensorBoard, and the page of `compare.py`, in a browser."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from urllib.request import urlopen

import aiohttp
import numpy as np
import pytest
import torch
from conftest import events_in, run, trainer_words
from matplotlib.image import imread

import compare
import comparison
import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no browser: chromium is not on the PATH"),
]
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
RUNS = ["parity/version_0", "parity_autograd/version_0"]
UPDATES = 30
# TensorBoard's elements keep what they show in shadow trees, where selectors do not reach.
SCRIPT = """
const deep = (selector, root) => [...root.querySelectorAll('*')].flatMap(element => [
    ...(element.matches(selector) ? [element] : []),
    ...(element.shadowRoot ? deep(selector, element.shadowRoot) : [])]);
const seen = (selector, root = document) =>
    deep(selector, root).filter(element => element.checkVisibility());
const inside = element => element.shadowRoot ?? element;
const drawn = card => seen('path.line', inside(card)).filter(p => p.getAttribute('d')).length;
"""


async def look(port, page, expression, enough, tries=600):
    """Return the value of `expression` on a page, as soon as it is `enough`.

    Chromium without a screen is driven over its DevTools protocol.
    """
    code, value = f"JSON.stringify((() => {{{SCRIPT} return {expression}}})())", None
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"]) as socket:

            async def call(number, method, **params):
                await socket.send_json({"id": number, "method": method, "params": params})
                answer = {}
                while answer.get("id") != number:  # events of the page come in between
                    answer = await socket.receive_json(timeout=30)
                return answer["result"]

            await call(0, "Page.navigate", url=page)
            for number in range(1, tries):
                result = (await call(number, "Runtime.evaluate", expression=code))["result"]
                assert result["type"] == "string", result.get("description")
                value = json.loads(result["value"])
                if value and enough(value):
                    return value
                await asyncio.sleep(0.1)
    raise AssertionError(f"after {tries / 10:.0f} s {page} shows {value}")


def until(condition, seconds=60):
    """Return the value of `condition` once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not true after {seconds} s"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The folder of two runs, one in each mode."""
    folder = tmp_path_factory.mktemp("logs")
    for name in ("parity", "parity_autograd"):
        words = trainer_words(max_steps=UPDATES, default_root_dir=folder)
        status, _, err = run("--config", name, *words)
        assert status == 0, err
    return folder


@pytest.fixture(scope="module")
def board(logs, tmp_path_factory):
    """The address of a TensorBoard that has read both runs to their end."""
    output = tmp_path_factory.mktemp("board") / "output.txt"
    words = f"-m tensorboard.main --logdir {logs} --port 0 --load_fast=false --reload_interval 1"
    with output.open("w") as file:
        process = subprocess.Popen([sys.executable, *words.split()], stdout=file, stderr=file)
    try:
        at = until(lambda: re.search(r"http://\S+/", output.read_text()))
        until(lambda: _last_written(at[0]))
        yield at[0]
    finally:
        process.terminate()
        process.wait()


def _last_written(address):
    with urlopen(f"{address}data/plugin/scalars/tags") as answer:
        tags = json.load(answer)
    return all("test/accuracy" in tags.get(name, ()) for name in RUNS)


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    """A function that looks at a page."""
    profile = tmp_path_factory.mktemp("profile")
    words = [CHROMIUM, *QUIET, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    words += ["--window-size=1600,1200", "about:blank"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = profile / "DevToolsActivePort"
    try:
        port = until(lambda: file.is_file() and file.read_text().split()[0])
        yield lambda page, *words: asyncio.run(look(port, page, *words))
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def browser(show, board):
    """A function that looks at a tab of TensorBoard."""
    return lambda tab, *words: show(f"{board}#{tab}", *words)


def test_charts_of_the_curves_in_both_modes(browser):
    wanted = {"train/loss", "test/loss", "update/gradient_norm"}
    browser(
        f"scalars&tagFilter=^({'|'.join(wanted)})$",
        "seen('tf-scalar-card').map(card => [card.tag, drawn(card)])",
        lambda cards: wanted <= {tag for tag, lines in cards if lines >= len(RUNS)},
    )
    (_, text), *_ = browser(  # train and test in one chart
        "custom_scalars",
        "seen('tf-custom-scalar-multi-line-chart-card').map(card => "
        "[drawn(card), inside(card).textContent])",
        lambda cards: cards and cards[0][0] >= 2 * len(RUNS),
    )
    assert all(f"{part}/loss ({name})" in text for name in RUNS for part in ("train", "test"))


def test_the_pictures_are_whole(browser, logs):
    files = [imread(file) for name in RUNS for file in (logs / name).glob("pictures/*.png")]
    sizes = sorted([picture.shape[1], picture.shape[0]] for picture in files)
    assert sizes
    browser(
        "images",
        "seen('img', inside(deep('tf-image-dashboard', document)[0]))"
        ".map(image => [image.naturalWidth, image.naturalHeight])",
        lambda shown: sorted(shown) == sizes,
    )


def test_histograms_of_the_weights(browser):
    browser(
        "histograms",
        "seen('path.outline', inside(deep('tf-histogram-dashboard', document)[0])).length",
        lambda outlines: outlines >= 2 * len(RUNS),  # before and after
    )


def test_a_row_of_hyperparameters_with_the_final_metrics(browser, logs):
    cells = browser(
        "hparams",
        "seen('vaadin-grid-cell-content').map(cell => cell.textContent.trim())",
        lambda cells: set(RUNS) <= set(cells),
    )
    columns = cells[: cells.index(RUNS[0])]
    for name in RUNS:
        first = cells.index(name)
        row = dict(zip(columns, cells[first : first + len(columns)], strict=True))
        events = events_in(logs / name)
        for tag in ("train/loss", "test/loss", "test/accuracy"):
            last = events.Scalars(tag)[-1].value
            assert float(row[tag]) == pytest.approx(last, rel=1e-4)  # five digits are shown
        assert row["gradient"] == ("autograd" if "autograd" in name else "explicit")


MOVE = """(() => {
    const set = (id, name, value) => {
        const element = document.querySelector(id);
        element[name] = value;
        element.dispatchEvent(new Event('input'));
        return element[name];
    };
    if (location.pathname !== '%s' || document.readyState !== 'complete') return null;
    const points = id => document.querySelector(id).getAttribute('points');
    set('#intercept', 'checked', %s);
    const moved = [set('#lr', 'value', %s), set('#momentum', 'value', %s)].map(Number);
    return [moved, points('#mean'), points('#sum'), document.querySelector('#verdict').textContent];
})()"""


@pytest.mark.parametrize("table", ["linear", "one.csv", "two.csv"])
def test_the_page_draws_the_paths_of_the_package(show, tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    rows = [(a, a % 5, 3 * a - (a % 5) + a % 3) for a in range(1, 13)]
    one, two = [("a", "y"), *(row[::2] for row in rows)], [("a", "b", "y"), *rows]
    for name, lines in (("one.csv", one), ("two.csv", two)):
        (tmp_path / name).write_text("\n".join(",".join(map(str, line)) for line in lines))
    words = ["--csv", table, "--target", "y"] if table.endswith("csv") else ["--config", table]
    assert compare.main([*words, "--html", "page.html", "--out", "out", "--steps", "40"]) == 0
    if table == "linear":
        problem = comparison.load_problem(table)
    else:
        problem, _ = page.table_problem(table, "y", None, None, torch.float64)
    for share, momentum, intercept in ((0.3, 0, False), (0.9, 0.25, True), (0.1, 0.9, True)):
        chosen = problem
        if table == "linear" and intercept:
            chosen = replace(problem, bias=torch.zeros(()).double())
        lr, trained = share * chosen.curvature.max_lr(momentum), str(intercept or table != "linear")
        file = f"{tmp_path}/page.html"
        move = MOVE % (file, trained.lower(), lr, momentum)
        moved, mean, total, said = show(f"file://{file}", move, lambda found: found[1])
        assert moved == pytest.approx([lr, momentum], rel=1e-9)
        chosen = replace(chosen, lr=moved[0], momentum=moved[1])
        drawn = np.array([point.split(",") for point in mean.split()], float)
        assert drawn.shape == (41, 2)
        path = comparison.by_trainer(chosen, 40, "explicit").path[:, :2]
        assert np.abs(drawn - path).max() < 1e-9
        # The page ends a path that diverges where it is far outside.
        drawn = np.array([point.split(",") for point in total.split()], float)
        path = comparison.by_numpy(chosen, 40, "sum").path[: len(drawn), :2]
        assert len(drawn) >= 3 and np.abs(drawn - path).max() < 1e-9 * np.abs(path).max()
        stable = chosen.curvature.max_lr(momentum)
        assert f"largest stable rate is {stable:.4g} for the gradient of the mean" in said

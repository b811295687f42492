"""What a run leaves behind is seen in TensorBoard, in a real browser."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import aiohttp
import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import LIGHTNINGS, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: chromium is not on the PATH"),
    pytest.mark.filterwarnings(LIGHTNINGS),
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


class Browser:
    """Chromium without a screen, driven over its DevTools protocol; a context manager."""

    def __init__(self, profile):
        self.port, self.sent = Path(profile) / "DevToolsActivePort", 0
        self.loop = asyncio.new_event_loop()
        self.process = subprocess.Popen(
            [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
            + ["--window-size=1600,1200", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        port = until(lambda: self.port.is_file() and self.port.read_text().split()[0])
        self.loop.run_until_complete(self._connect(f"http://127.0.0.1:{port}/json"))
        return self

    async def _connect(self, address):
        self.session = aiohttp.ClientSession()
        async with self.session.get(address) as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self.socket = await self.session.ws_connect(pages[0]["webSocketDebuggerUrl"])

    def __exit__(self, *exception):
        self.loop.run_until_complete(self.session.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait()

    def call(self, method, **params):
        """One command of the protocol, and its result."""
        return self.loop.run_until_complete(self._call(method, params))

    async def _call(self, method, params):
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        answer = {}
        while answer.get("id") != self.sent:  # events of the page come in between
            answer = await self.socket.receive_json(timeout=30)
        return answer["result"]

    def look(self, page, expression, enough):
        """The value of `expression` on a page of TensorBoard, as soon as it is `enough`."""
        self.call("Page.navigate", url=page)
        code = f"JSON.stringify((() => {{{SCRIPT} return {expression}}})())"

        def value():
            result = self.call("Runtime.evaluate", expression=code)["result"]
            assert result["type"] == "string", result.get("description")
            return json.loads(result["value"])

        return until(lambda: (v := value()) and enough(v) and v, missing=value)


def until(condition, seconds=60, missing=lambda: "nothing"):
    """What `condition` returns once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"after {seconds} s: {missing()}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The folder of two runs, one on each road."""
    folder = tmp_path_factory.mktemp("logs")
    for name in ("parity", "parity_autograd"):
        options = {"max_steps": UPDATES, "default_root_dir": folder, "enable_progress_bar": "false"}
        words = [w for option, value in options.items() for w in (f"--trainer.{option}", value)]
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
        at = until(lambda: re.search(r"http://\S+/", output.read_text()), missing=output.read_text)
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
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_a_chart_of_each_curve_with_both_roads(board, browser):
    wanted = {"train/loss", "test/loss", "gradient_norm"}
    browser.look(
        f"{board}#scalars&tagFilter=^({'|'.join(wanted)})$",
        "seen('tf-scalar-card').map(card => [card.tag, drawn(card)])",
        lambda cards: wanted <= {tag for tag, lines in cards if lines >= len(RUNS)},
    )


def test_train_and_test_of_both_roads_in_one_chart(board, browser):
    (_, text), *_ = browser.look(
        f"{board}#custom_scalars",
        "seen('tf-custom-scalar-multi-line-chart-card').map(card => "
        "[drawn(card), inside(card).textContent])",
        lambda cards: cards and cards[0][0] >= 2 * len(RUNS),
    )
    for name in RUNS:
        assert f"train/loss ({name})" in text and f"test/loss ({name})" in text


def test_the_pictures_are_whole(board, browser, logs):
    files = [imread(file) for name in RUNS for file in (logs / name).glob("pictures/*.png")]
    sizes = sorted([picture.shape[1], picture.shape[0]] for picture in files)
    assert sizes
    browser.look(
        f"{board}#images",
        "seen('img', inside(deep('tf-image-dashboard', document)[0]))"
        ".map(image => [image.naturalWidth, image.naturalHeight])",
        lambda shown: sorted(shown) == sizes,
    )


def test_histograms_of_the_weights(board, browser):
    browser.look(
        f"{board}#histograms",
        "seen('path.outline', inside(deep('tf-histogram-dashboard', document)[0])).length",
        lambda outlines: outlines >= 2 * len(RUNS),  # before and after
    )


def test_a_row_of_hyperparameters_with_the_final_metrics(board, browser, logs):
    cells = browser.look(
        f"{board}#hparams",
        "seen('vaadin-grid-cell-content').map(cell => cell.textContent.trim())",
        lambda cells: set(RUNS) <= set(cells),
    )
    columns = cells[: cells.index(RUNS[0])]
    for name in RUNS:
        first = cells.index(name)
        row = dict(zip(columns, cells[first : first + len(columns)], strict=True))
        events = EventAccumulator(str(logs / name), {"scalars": 0}).Reload()
        for tag in ("train/loss", "test/loss", "test/accuracy"):
            last = events.Scalars(tag)[-1].value
            assert float(row[tag]) == pytest.approx(last, rel=1e-4)  # five digits are shown
        assert row["gradient"] == ("autograd" if "autograd" in name else "explicit")

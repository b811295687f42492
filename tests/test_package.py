"""The sdist can be tested, the wheel holds what a run needs and runs where the checkout is not."""

import shutil
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from conftest import good_process, trainer_words

ROOT = Path(__file__).parent.parent
BUILD = ["-m", "hatchling", "build", "--target"]  # without pip, which not every environment has


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    good_process(*BUILD, "sdist", "--directory", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """A wheel built from the sdist, without fetching anything."""
    folder = tmp_path_factory.mktemp("wheel")
    good_process(*BUILD, "wheel", "--directory", folder, cwd=sources)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder of that wheel alone, with the console script that it names."""
    target = tmp_path_factory.mktemp("target")
    zipfile.ZipFile(wheel).extractall(target)
    (names,) = target.glob("*.dist-info/entry_points.txt")
    assert "lightning-gd = lightning_gd.cli:main" in names.read_text()
    script = target / "bin" / "lightning-gd"
    script.parent.mkdir()
    script.write_text("import sys\nfrom lightning_gd.cli import main\nsys.exit(main())\n")
    return target


@pytest.fixture
def elsewhere(installed, tmp_path):
    """How to run a command in an empty folder, where imports find the installation first."""
    return {"cwd": tmp_path, "PYTHONPATH": str(installed)}


def test_the_sdist_holds_every_file(sources):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("there is no git, or the tests themselves come from an sdist")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    held = {p.relative_to(sources).as_posix() for p in sources.rglob("*") if p.is_file()}
    assert held >= set(listed.stdout.splitlines()) > set()


@pytest.mark.slow
def test_tests_pass_where_the_sdist_was_unpacked(sources):
    words = ["-m", "pytest", "-q", "-n", "0", "tests/test_moments.py", "tests/test_structure.py"]
    good_process(*words, cwd=sources, PYTHONPATH=str(sources))


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "lightning_gd").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in package if path.suffix != ".pyc"}
    assert held == wanted
    named = {"py.typed", "experiments/parity.yaml", "data/longley.csv", "help.txt"}
    assert {f"lightning_gd/{name}" for name in named} <= held


@pytest.mark.slow
def test_the_console_script_trains_in_an_empty_folder(installed, elsewhere, tmp_path):
    words = ["--config", "parity", *trainer_words(max_steps=5, accelerator="cpu")]
    done = good_process(installed / "bin" / "lightning-gd", *words, **elsewhere)
    assert "test/accuracy" in done.stdout
    run = tmp_path / "lightning_logs" / "parity" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "pictures" / "loss.png").is_file()


def test_the_module_and_its_help_are_those_of_the_installation(installed, elsewhere):
    where = "import lightning_gd; print(lightning_gd.__file__)"
    found = good_process("-c", where, **elsewhere).stdout
    assert Path(found.strip()).is_relative_to(installed)  # and so are its submodules
    begun = time.perf_counter()
    printed = good_process("-m", "lightning_gd", "--help", **elsewhere).stdout
    assert time.perf_counter() - begun < 5  # a fraction of it, unless Lightning is imported
    for experiment in (ROOT / "lightning_gd" / "experiments").glob("*.yaml"):
        assert f"  {experiment.stem} " in printed

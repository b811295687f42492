"""The command line: verbs, experiments by name, exit codes. Lightning is imported only to run."""

import os
import re
import sys
from argparse import ArgumentError
from pathlib import Path
from traceback import print_exception

from lightning_gd import __version__
from lightning_gd.arguments import UsageError, check, unknown

EXPERIMENTS = Path(__file__).parent / "experiments"
VERBS = ("fit", "validate", "test", "predict", "check", "export")
DEFAULT = "parity"
LARGEST = 10**7  # bytes of a YAML file, and values in it
SHORT = {"--verbose": "--curvature_report.verbose=true"}

# Lines of the parser's messages that tell of all types it tried.
_NOISE = re.compile(
    r"^[ -]*(Does not validate|Subtypes:|Errors:|Given value type:|Given value: \w+\(|"
    r"Expected a <class 'NoneType'>).*",
    re.MULTILINE,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    It is 0 on success, 1 for a failure of files, network or another process, 2 for wrong
    arguments, 3 if the run diverged, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments in (["-h"], ["--help"]):
            print(_help())
        elif arguments == ["--version"]:
            print(f"lightning_gd {__version__}")
        else:
            _run(*_checked(resolve(arguments)))
        return 0
    except KeyboardInterrupt:  # before the run or after it; in a fit the callback `Interrupt` acts
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # the parser has printed its message
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if "--traceback" in arguments:
            print_exception(error)
        print(f"error: {_message(error)}", file=sys.stderr)
        return _status(error)


def resolve(arguments: list[str]) -> list[str]:
    """Add the verb, the default experiment and the paths of experiments given by name.

    The result depends on the arguments alone, so that every process of a run resolves the same.
    """
    arguments = [SHORT.get(word, word) for word in arguments if word != "--traceback"]
    bare = not arguments or arguments[0].startswith("-")
    verb = "fit" if bare else arguments.pop(0)
    if verb not in VERBS:
        raise UsageError(unknown("verb", verb, VERBS))
    configs, rest, words = [], [], iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            configs.append(_experiment(value if equals else next(words, "")))
        else:
            rest.append(word)
    if not configs and not {"-h", "--help"} & set(rest):
        parts = [part for word in rest for part in word.split("=", 1)]
        typed = dict(zip(parts, parts[1:], strict=False))
        configs = [_default_experiment(typed.get("--model", ""), typed.get("--data", ""))]
    # The files come first: what is typed wins over them, wherever it was typed.
    start = ["--experiment", configs[-1][0]] if configs else []
    start += [word for _, path in configs for word in ("--config", path)]
    if verb == "fit":
        start += ["--test_after_fit", "true" if bare else "false"]
    return [verb, *start, *rest]


def experiments() -> list[str]:
    """Return the names of the experiments in the package."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def _default_experiment(model: str, data: str) -> tuple[str, str]:
    """Return folder and path of the experiment whose defaults apply where no --config is typed.

    That is `plain` where neither model nor data are those of another experiment. A model that
    is not the experiment's own is filed under its name.
    """
    own = "." in model.removeprefix("lightning_gd.")
    if data.endswith("TableData") and not own:
        experiment = "table"
    else:
        experiment = "plain" if model and data else DEFAULT
    path, name = EXPERIMENTS / f"{experiment}.yaml", model.rpartition(".")[2]
    other = own or f"lightning_gd.{name}\n" not in path.read_text(encoding="utf-8")
    return name if other and name.isidentifier() else experiment, str(path)


def _experiment(text: str) -> tuple[str, str]:
    """Return name and path of an experiment given by name, or of a file."""
    if text in experiments():
        return text, str(EXPERIMENTS / f"{text}.yaml")
    if Path(text).is_file():
        _check_yaml(Path(text))
        return Path(text).stem, text
    if os.sep in text or text.endswith((".yaml", ".yml")):
        raise UsageError(f"--config {text}: there is no such file")
    raise UsageError(unknown("experiment", text, experiments()))


def _check_yaml(file: Path) -> None:
    import yaml

    if file.stat().st_size > LARGEST:
        raise UsageError(f"--config {file} is larger than {LARGEST:,} bytes")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {file} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} must map keys such as model, data, trainer to values")
    if _size(content, {}) > LARGEST:
        raise UsageError(f"--config {file} holds more than {LARGEST:,} values where its * stand")


def _size(value: object, known: dict[int, float]) -> float:
    """Return the number of values with every alias written out; infinite for a circle."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def _help() -> str:
    called = Path(sys.argv[0])
    program = "python -m lightning_gd" if called.name == "__main__.py" else called.name
    text = Path(__file__).with_name("help.txt").read_text(encoding="utf-8")
    lines = [text.replace("PROGRAM", program)]
    for name in experiments():
        with (EXPERIMENTS / f"{name}.yaml").open(encoding="utf-8") as file:
            lines.append(f"  {name:21}{file.readline().lstrip('# ')}")
    return "".join(lines).strip()


def _checked(words: list[str]) -> list[str]:
    sys.path.insert(0, os.getcwd())  # the user's own models, by dotted path
    check(words[1:])
    return words


def _run(verb: str, *words: str) -> None:
    shown = sys.stderr.isatty()
    if shown:  # for the seconds that it takes
        print("loading PyTorch and Lightning ...", end="", file=sys.stderr, flush=True)
    from lightning_gd.lightning_cli import run

    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    run(verb, list(words))


def _status(error: Exception) -> int:
    """Return the exit status: 2 for what Python, the parser and Lightning call a wrong argument."""
    name = type(error).__name__  # of classes whose modules import Lightning
    if isinstance(error.__cause__, OSError):  # the parser wraps errors of files in a ValueError
        return 1
    kinds = (ValueError, TypeError, ArgumentError, NotImplementedError)
    usage = isinstance(error, kinds) or name == "MisconfigurationException"
    return 3 if name == "DivergenceError" else 2 if usage else 1


def _message(error: Exception) -> str:
    """Return the error in one line or a few, without the types that the parser tried."""
    text = str(error)
    if isinstance(error, ArgumentError) or "Does not validate" in text:
        text = " ".join(_NOISE.sub("", text).split()).removeprefix("- ")
    plain = _status(error) > 1 or isinstance(error, (OSError, RuntimeError))
    return text if plain else f"{type(error).__name__}: {text}"

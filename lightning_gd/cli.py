"""The command line: verbs, experiments by name, exit codes. Lightning is imported only to run."""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import ArgumentError
from pathlib import Path
from traceback import print_exception

from lightning_gd.refusals import DivergenceError

EXPERIMENTS = Path(__file__).parent / "experiments"
VERBS = {
    "fit": "train, and stop there",
    "validate": "evaluate on the validation rows",
    "test": "evaluate on the test rows",
    "predict": "predict the test rows",
}
DEFAULT = "parity"

# Of the parser's message on a value that fits none of several types, all but the reasons.
_NOISE = re.compile(
    r"[ -]*(Does not validate against|Subtypes:|Errors:|Given value type:"
    r"|Given value: (Namespace|NestedArg)\(|Expected a <class 'NoneType'>)"
)


class UsageError(ValueError):
    """The user wrote something that cannot be meant; exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; `None` takes those of the process.

    Returns:
        0 on success, 1 where the world failed (files, network), 2 where the arguments are wrong,
        3 where the run diverged.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    try:
        if arguments in (["-h"], ["--help"]):
            print(_help())
            return 0
        # Processes started by Lightning read sys.argv again: they must see what this one runs.
        sys.argv[1:] = resolve(arguments)
        _run()
        return 0
    except SystemExit as stop:  # the parser has printed its message
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if traceback:
            print_exception(error)
        print(f"error: {_message(error)}", file=sys.stderr)
        if isinstance(error, DivergenceError):
            return 3
        return 2 if _written_wrong(error) else 1


def resolve(arguments: list[str]) -> list[str]:
    """Add the verb, the default experiment and the paths of experiments given by name.

    Raises:
        UsageError: If a verb or an experiment is unknown.
    """
    arguments = [argument for argument in arguments if argument != "--traceback"]
    bare = not arguments or arguments[0].startswith("-")
    verb = "fit" if bare else arguments.pop(0)
    if verb not in VERBS:
        raise UsageError(_unknown("verb", verb, VERBS))
    configs, rest, words = [], [], iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            configs.append(_experiment(value if equals else next(words, "")))
        else:
            rest.append(word)
    if not configs and not {"-h", "--help"} & set(rest):
        table = any(re.fullmatch(r"(--data=)?([\w.]+\.)?TableData", word) for word in rest)
        configs = [_experiment("table" if table else DEFAULT)]
    # The name of the file, unless one stands in it; then the files, wherever they were written:
    # what is typed out wins over them.
    start = ["--experiment", configs[-1][0]] if configs else []
    start += [word for _, path in configs for word in ("--config", path)]
    if verb == "fit":
        start += ["--test_after_fit", "true" if bare else "false"]
    return [verb, *start, *rest]


def experiments() -> list[str]:
    """The names of the experiments in the package."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def _experiment(text: str) -> tuple[str, str]:
    if text in experiments():
        return text, str(EXPERIMENTS / f"{text}.yaml")
    if Path(text).is_file():
        _check_yaml(Path(text))
        return Path(text).stem, text
    if os.sep in text or text.endswith((".yaml", ".yml")):
        raise UsageError(f"--config {text}: there is no such file")
    raise UsageError(_unknown("experiment", text, experiments()))


def _check_yaml(file: Path) -> None:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise UsageError(f"--config {file}{place}: not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} must map keys such as model, data, trainer to values")


def _unknown(what: str, text: str, known: object) -> str:
    names = list(known)  # pyright: ignore[reportCallIssue, reportArgumentType]
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {text!r}: {hint}known: {', '.join(names)}"


def _summary(experiment: str) -> str:
    with (EXPERIMENTS / f"{experiment}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def _help() -> str:
    verbs = "\n".join(f"  {verb:18}{meaning}" for verb, meaning in VERBS.items())
    known = "\n".join(f"  {name:18}{_summary(name)}" for name in experiments())
    return f"""Train with gradients derived by hand, or by autograd, and compare.

usage: train.py [verb] [--config EXPERIMENT] [options]

Without a verb: train, then test. Without --config: the experiment {DEFAULT!r}.

verbs:
{verbs}

experiments (or the path of a YAML file):
{known}

options that are often wanted:
  --model.gradient autograd      let autograd compute the gradient
  --model.lr 0.001               learning rate
  --data.batch_size 64           mini-batches instead of the full batch
  --trainer.max_steps 1000       number of updates
  --trainer.strategy ddp --trainer.devices 2 --trainer.accelerator cpu
                                 two processes
  --model mypackage.MyModel      a model of your own
  --config table --data.path FILE --data.target COLUMN
                                 a table of your own
  --ckpt_path last               go on with the last run of the experiment
  --traceback                    show where an error came from

All options: train.py fit --help"""


def _run() -> None:
    sys.path.insert(0, os.getcwd())  # models of the user's own, by dotted path
    from lightning_gd.lightning_cli import run

    run()


def _written_wrong(error: Exception) -> bool:
    """Whether what the user wrote is wrong, as Python, the parser and Lightning call it."""
    if isinstance(error.__cause__, OSError):  # the parser wraps what a file did in a ValueError
        return False
    kinds = (ValueError, TypeError, ArgumentError, NotImplementedError)
    # Lightning is not imported here.
    return isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException"


def _message(error: Exception) -> str:
    """The error in one line or a few, without the parser's account of what else it tried."""
    text = str(error)
    if "Does not validate against" in text:
        kept = [line.strip(" -") for line in text.splitlines() if not _NOISE.match(line)]
        text = " ".join(kept)
    plain = (OSError, RuntimeError, ArithmeticError, ValueError)
    plain = _written_wrong(error) or isinstance(error, plain)
    return text if plain else f"{type(error).__name__}: {text}"

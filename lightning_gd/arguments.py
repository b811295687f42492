"""What can be said of the words of a command before PyTorch and Lightning are imported.

Settings and their types are read from the source of the classes, so that a misspelt one is
answered within a second. What is not understood here is left to the parser.
"""

import ast
import contextlib
import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

import lightning_gd

BASES = {"model": "GradientDescentModule", "data": "TensorDataModule"}
WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "None": "null",
    "list": "a list such as '[a, b]'",
}
CALLBACKS = {  # the key of each on the command line
    "checkpoint": "RunCheckpoint",
    "gradient_check": "GradientCheck",
    "curvature_report": "CurvatureReport",
    "test_curve": "TestCurve",
    "histograms": "WeightHistograms",
    "coefficients": "Coefficients",
    "predictions": "Predictions",
    "interrupt": "Interrupt",
    "end_table": "EndTable",  # records the last point, which pictures show
    "pictures": "Pictures",
    "progress_bar": "UpdateProgressBar",
}
OPEN = {"class_path", "init_args", "dict_kwargs", "help"}  # of jsonargparse, beside the settings


class UsageError(ValueError):
    """A verb, an experiment, an option or a value that does not exist; exit status 2."""


def unknown(what: str, text: str, known: Iterable[str], form: str = "") -> str:
    """Return the message for a word that is not known, with the nearest that is."""
    near = nearest(text, known := list(known), cutoff=0.5)
    hint = f"did you mean {near!r}? " if near else ""
    return f"unknown {what} {text!r}: {hint}known: {', '.join(known)}{form}"


def nearest(text: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known word that a text is most like, whatever its case; empty for none."""
    lowered = {word.lower(): word for word in known}
    near = difflib.get_close_matches(text.lower(), lowered, n=1, cutoff=cutoff)
    return lowered[near[0]] if near else ""


def check(words: Iterable[str]) -> None:
    """Raise UsageError for an unknown model, data or setting, or a value of another type."""
    chosen = dict(CALLBACKS)
    options = list(_options(words))
    for option, value in options:
        if option == "config":
            chosen |= _check_file(value)
        elif option in BASES:
            chosen[option] = _check_class(option, value)
        elif option in CALLBACKS:
            if value == "false":
                raise UsageError(f"--{option} false: null switches it off")
            chosen[option] = ""  # another class, or null
    for option, value in options:
        option, value = option.removesuffix("+"), "[]" if option.endswith("+") else value
        part, _, name = option.partition(".")
        name = name.removeprefix("init_args.")
        settings = settings_of(part, chosen.get(part, ""))
        if name and settings:
            _check_setting(f"--{option}", part, name, value, settings)
        elif not name:
            _check_prefix(option, chosen)


def _options(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each option without its dashes, and its value as it was typed."""
    left = iter(words)
    for word in left:
        if word.startswith("--") and word != "--help":
            option, equals, value = word[2:].partition("=")
            yield option, value if equals else next(left, "")


def _check_file(path: str) -> dict[str, str]:
    """Check the classes and settings in a YAML file, and return the classes."""
    content, chosen = yaml.safe_load(Path(path).read_text(encoding="utf-8")), {}
    for part in BASES:
        entry = content.get(part)
        if isinstance(entry, dict) and isinstance(entry.get("class_path"), str):
            chosen[part] = _check_class(part, entry["class_path"])
            settings = settings_of(part, chosen[part])
            given = entry.get("init_args") or {}
            if not isinstance(given, dict):
                raise UsageError(f"{path}: {part}.init_args={given!r} must map settings to values")
            for name, value in given.items() if settings else ():
                label = f"{path}: {part}.init_args.{name}"
                _check_setting(label, part, name, _typed(value), settings)
    return chosen


def _typed(value: object) -> str:
    """Return a value of a YAML file as it would be typed."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _check_class(part: str, text: str) -> str:
    """Return the name of a class of this package; empty for that of another module."""
    module, _, name = text.rpartition(".")
    if module.partition(".")[0] != "lightning_gd" and module:
        if find_spec(module.partition(".")[0]) is None:
            raise UsageError(f"--{part} {text}: there is no module {module.partition('.')[0]!r}")
        return ""
    is_yaml = text.endswith((".yaml", ".yml")) or text.startswith("{")
    if name != BASES[part] and not is_yaml and not _derives(name, BASES[part]):
        known = [name for name in lightning_gd.names() if _derives(name, BASES[part])]
        own = f"; one of your own is given as module.{part.capitalize()}"
        raise UsageError(unknown(part, name, known, own))
    return name if name in lightning_gd.names() else ""


def _check_prefix(option: str, chosen: dict[str, str]) -> None:
    """Refuse the name of a setting without that of its part."""
    for part in (*BASES, "trainer"):
        if option in settings_of(part, chosen.get(part, "")):
            raise UsageError(f"unknown option --{option}: did you mean --{part}.{option}?")


def _check_setting(
    label: str, part: str, name: str, value: str, settings: dict[str, ast.expr | None]
) -> None:
    first, _, rest = name.partition(".")
    shortened = part == "trainer" and any(known.startswith(first) for known in settings)
    if first in OPEN or first not in settings and shortened:
        return
    if first not in settings:
        near = nearest(first, settings)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(settings)}"
        raise UsageError(f"{label}: {part} has no setting {first!r}: {hint}")
    accepted = _alternatives(settings[first])
    if not rest and "" not in accepted and not any(_takes(form, value) for form in accepted):
        hint = f"; did you mean {near}?" if (near := nearest(repr(value), accepted)) else ""
        forms = " or ".join(WORDS.get(form, form) for form in accepted)
        raise UsageError(f"{label}={value} must be {forms}{hint}")


def _takes(form: str, text: str) -> bool:
    """Tell whether a text is a value of the type, or of the literal, that `form` names."""
    try:
        value = yaml.safe_load(text) if form != "str" else text
    except yaml.YAMLError:
        return False
    if form == "float":
        with contextlib.suppress(TypeError, ValueError):
            float(value)  # also of 1e-3, which YAML takes for a text
            return not isinstance(value, bool)
        return False
    kinds = {"int": int, "bool": bool, "str": str, "None": type(None), "list": list}
    if form in kinds:
        return isinstance(value, kinds[form]) and (form != "int" or not isinstance(value, bool))
    return form == repr(value) or form == repr(text)


def _alternatives(annotation: ast.expr | None) -> list[str]:
    """Return the types and literals that an annotation accepts; an empty name for any other."""
    match annotation:
        case ast.BinOp(left, ast.BitOr(), right):
            return _alternatives(left) + _alternatives(right)
        case ast.Name(name) if name in WORDS:
            return [name]
        case ast.Constant(None):
            return ["None"]
        case ast.Subscript(ast.Name("Literal"), literals):
            found = ast.literal_eval(literals)
            return [repr(value) for value in (found if isinstance(found, tuple) else [found])]
        case ast.Subscript(ast.Name("list"), _):
            return ["list"]
        case ast.Subscript(ast.Name("Optional"), inner):
            return [*_alternatives(inner), "None"]
        case ast.Subscript(ast.Name("Union"), ast.Tuple(parts)):
            return [form for part in parts for form in _alternatives(part)]
    return [""]


@cache
def settings_of(part: str, name: str) -> dict[str, ast.expr | None]:
    """Return the arguments of a class and their annotations; empty where these are not known."""
    found = _trainer() if part == "trainer" else _class(name)
    if found is None:
        return {}
    made = next((f for f in found.body if getattr(f, "name", "") == "__init__"), None)
    form = made.args if isinstance(made, ast.FunctionDef) else None
    inherited = settings_of("", _base(found)) if form is None or form.kwarg else {}
    arguments = [*form.args[1:], *form.kwonlyargs] if form else []
    return {argument.arg: argument.annotation for argument in arguments} | inherited


def _trainer() -> ast.ClassDef | None:
    """Return the definition of Lightning's Trainer, without importing it."""
    package = find_spec("lightning")
    file = Path((package and package.origin) or "").parent / "pytorch/trainer/trainer.py"
    return _class_in(file, "Trainer") if file.is_file() else None


def _derives(name: str, base: str) -> bool:
    found = _class(name)
    return found is not None and (_base(found) == base or _derives(_base(found), base))


def _base(found: ast.ClassDef) -> str:
    return found.bases[0].id if found.bases and isinstance(found.bases[0], ast.Name) else ""


def _class(name: str) -> ast.ClassDef | None:
    """Return the definition of a class of this package, by its public name."""
    place = lightning_gd.names().get(name)
    if place is None:
        return None
    return _class_in(
        Path(lightning_gd.__file__).parents[1] / Path(*place.split(".")).with_suffix(".py"), name
    )


@cache
def _class_in(file: Path, name: str) -> ast.ClassDef | None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next(classes, None)

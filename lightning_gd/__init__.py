"""Gradient descent with hand-derived gradients in PyTorch Lightning.

Every public class and function of the modules below is a name of this package, found by its
file: a new model, data or callback is exported because it is there. A name is imported when it
is first used, so that `--help` need not wait for Lightning.
"""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

_PLACES = (
    "module.py batch.py moments.py curvature.py leastsquares.py checkpoints.py resume.py logger.py "
    "gradcheck/check.py gradcheck/function.py gradcheck/objective.py gradcheck/report.py "
    "models/*.py data/*.py callbacks/*.py"
)


@cache
def names() -> dict[str, str]:
    """Return the dotted module of every public name."""
    root, found = Path(__file__).parent, {}
    for file in (file for place in _PLACES.split() for file in sorted(root.glob(place))):
        module = ".".join([__name__, *file.relative_to(root).with_suffix("").parts])
        for name in re.findall(r"^(?:class|def) ([a-zA-Z]\w*)", file.read_text("utf-8"), re.M):
            found.setdefault(name, module)
    return found


def __getattr__(name: str) -> Any:
    module = None if name.startswith("_") else names().get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(names())

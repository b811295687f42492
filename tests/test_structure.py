"""Imports run one way, as the README's table lists the files; no private names of libraries."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_gd"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
LAYOUT = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Layout")[2]
# The files in the order of the table: row by row, and in a row from left to right.
ROWS = re.findall(r"^\| (`.*?) \|", LAYOUT, re.M)
ORDER = re.findall(r"`([\w/]+(?:\.py|/))`", " ".join(ROWS))


OWNERS = ("optimizer_step", "global_optimizer")  # of hooks in torch.optim


def module_file(module):
    """The file of `lightning_gd.a.b`, or None for a name that is no module."""
    path = ROOT / Path(*module.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def imports(file):
    """The files of the package that a file imports, also inside functions and for types."""
    found = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {module_file(name) for name in found if name.startswith("lightning_gd.")}
    return files - {None, file}


def place(file):
    """The position of a file in the README's table; `folder/` stands for all files in it."""
    name = file.relative_to(PACKAGE).as_posix()
    return next((i for i, n in enumerate(ORDER) if n == name or name.startswith(n)), None)


def test_every_file_has_its_place_in_the_readme():
    known = [file for file in FILES if file.name not in ("__init__.py", "__main__.py")]
    assert [file.name for file in known if place(file) is None] == []
    assert [name for name in ORDER if not (PACKAGE / name).exists()] == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(file):
    here = place(file)
    if here is None:  # __init__, __main__
        return
    back = [f.name for f in imports(file) if f and (place(f) or 0) > here]
    assert back == []


def test_files_are_read_at_a_sitting():
    sizes = {file.name: file.read_text(encoding="utf-8").count("\n") for file in FILES}
    assert [name for name, size in sizes.items() if size > 240] == []
    assert sizes["module.py"] <= 200


def test_there_is_no_circle():
    left = {file: imports(file) for file in FILES}
    while free := [file for file, wanted in left.items() if not wanted & left.keys()]:
        for file in free:
            del left[file]
    assert sorted(file.name for file in left) == []


def test_no_private_name_of_a_library():
    """`other._name`, `self._name` that the package does not define, and imports of `_name`."""
    own = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    private = re.compile(r"_(?!_)\w*")
    found = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr not in own else []
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
                "lightning_gd"
            ):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [(file.name, name) for name in names if private.fullmatch(name)]
    hooks = (f"_{owner}_{when}_hooks" for owner in OWNERS for when in ("pre", "post"))
    # tests/test_direct.py and tests/test_any_module_processes.py notice one that is gone.
    assert set(found) == {("private.py", name) for name in ("_python_dispatch", *hooks)}

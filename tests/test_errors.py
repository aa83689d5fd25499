"""The exceptions of the package: all in one file, exported, and drawn in its docstring."""

import ast
import inspect

import balance_shim
from balance_shim import errors
from tests.test_layers import MODULES

DEFINED = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_docstring_shows_the_tree():
    """Each class stands in the docstring once, indented below the class that it extends."""
    above, drawn = [], {}
    for line in errors.__doc__.splitlines():
        name = line.lstrip(" │├└─")
        if line.startswith("    ") and name.isidentifier():
            depth = (len(line) - len(name)) // 4 - 1
            above[depth:] = [name]
            drawn[name] = above[depth - 1] if depth else None
    assert drawn.pop("RuntimeError") is None
    assert drawn == {name: kind.__base__.__name__ for name, kind in DEFINED.items()}


def test_all_are_exported():
    """A program imports them from the package."""
    assert all(getattr(balance_shim, name) is kind for name, kind in DEFINED.items())
    assert set(DEFINED) <= set(balance_shim.__all__)


def test_none_is_defined_elsewhere():
    """No other module of the package extends one of them."""
    extending = {
        f"{module}.{node.name}"
        for module, path in MODULES.items()
        if module != "errors"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and {ast.unparse(base).split(".")[-1] for base in node.bases} & set(DEFINED)
    }
    assert not extending

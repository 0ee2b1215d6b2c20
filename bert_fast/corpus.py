"""Real text that ships with Python: the docstrings of its standard library, and pydoc's topics.

Source is parsed, never imported, so reading it has no side effects; only modules compiled into the
interpreter (`builtins`, `itertools`, `time`, ...) are read through `__doc__`. The same Python gives
the same list, in the same order.
"""

import ast
import importlib
import inspect
import os
import re
import sys
import sysconfig
import types
import zlib
from pathlib import Path
from typing import NamedTuple

# Tests, applications and third-party packages inside the standard library.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "site-packages"}
_RECEIVER = re.compile(r"^\((\$\w+|self|cls|mcls|metacls)(, /)?(, |(?=\)))")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)
_COMPILED = (
    type,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)


class Doc(NamedTuple):
    name: str  # qualified: "json.dumps", "str.join"
    signature: str  # "(obj, *, skipkeys=False)", without self; "" where there is none
    text: str  # the docstring, its indentation removed


def docstrings(modules=None):
    """Each different docstring of three words or more, as a list of Doc.

    Modules come in alphabetical order, private ones last, and each in the order of its source; a
    repeated text is dropped.

    modules: names such as ("json", "concurrent.futures"), each with all that is inside; None for
    the whole standard library. Raises ValueError for a str, and for a name that has no Python
    source in the standard library and is not compiled into the interpreter.
    """
    if isinstance(modules, str):
        raise ValueError(
            f"docstrings: modules must be a list or tuple of names, got {modules!r};"
            f" give ({modules!r},)"
        )
    paths = _modules()
    if modules is not None:
        inside = {m: [name for name in paths if f"{name}.".startswith(f"{m}.")] for m in modules}
        if missing := [m for m, names in inside.items() if not names]:
            raise ValueError(f"docstrings: modules must be of the standard library, got {missing}")
        paths = {name: paths[name] for names in inside.values() for name in names}

    found = {}
    for name in sorted(paths, key=lambda name: (name.startswith("_"), name)):
        for doc in _parsed(name, paths[name]) if paths[name] else _compiled(name):
            if len(doc.text.split()) >= 3:
                found.setdefault(doc.text, doc)
    return list(found.values())


def topics():
    """The pages behind `help("topics")`: some eighty texts, most of them long, as a list of Doc."""
    from pydoc_data.topics import topics as pages  # 700 kB that docstrings() has no use for

    return [Doc(name, "", inspect.cleandoc(text)) for name, text in sorted(pages.items())]


def held_out(doc):
    """Whether doc is in the twelfth of the corpus that the shipped checkpoint was not trained on.

    Decided by a hash of the words of its first paragraph, so that texts with the same summary, such
    as the Python and C forms of a function, are all on one side.
    """
    summary = re.findall(r"\w+", doc.text.partition("\n\n")[0].lower())
    return zlib.crc32(" ".join(summary).encode()) % 12 == 0


def _modules():
    """{name: path of its source, or None if it is compiled into the interpreter}."""
    modules = dict.fromkeys(sys.builtin_module_names)
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if name.partition(".")[0] in sys.stdlib_module_names:  # distributions add their own
                modules[name.removesuffix(".__init__")] = path
    return modules


def _parsed(module, path):
    def visit(node, name):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield Doc(name, _signature(node), text)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, *_FUNCTIONS)):
                yield from visit(child, f"{name}.{child.name}")
            elif isinstance(child, (ast.If, ast.Try)):
                yield from visit(child, name)

    return visit(ast.parse(path.read_bytes()), module)


def _signature(node):
    """The signature of a function, or of a class's __init__."""
    if isinstance(node, _FUNCTIONS):
        return _RECEIVER.sub("(", f"({ast.unparse(node.args)})")
    inits = [n for n in node.body if isinstance(n, _FUNCTIONS) and n.name == "__init__"]
    return _signature(inits[0]) if inits else ""


def _compiled(module):
    def visit(owner, prefix):
        for key, value in sorted(vars(owner).items()):
            if key.startswith("_") or not isinstance(value, _COMPILED) or not value.__doc__:
                continue
            signature = " ".join((value.__text_signature__ or "").split())
            yield Doc(prefix + key, _RECEIVER.sub("(", signature), inspect.cleandoc(value.__doc__))
            if isinstance(value, type) and isinstance(owner, types.ModuleType):
                yield from visit(value, f"{prefix}{key}.")

    return visit(importlib.import_module(module), "" if module == "builtins" else f"{module}.")

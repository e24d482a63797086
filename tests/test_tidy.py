"""The style guide as a test: sizes, names, docstrings and habits of the product, read from its syntax trees.

Ruff, mypy and import-linter check what they can; this checks what they cannot. CONTRIBUTING.md has the rules and why.
"""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted([*ROOT.glob("tiercache/**/*.py"), *ROOT.glob("connectors/tiercache_connectors/**/*.py")])
MODULE_LINES_MAX, FUNCTION_LINES_MAX, POSITIONAL_MAX, PROTOCOL_METHODS_MAX = 500, 60, 6, 7
REFUSED_SUFFIXES = ("Manager", "Helper", "Util", "Utils", "Handler", "Impl", "Base", "Processor")
REFUSED_MODULES = {"base", "common", "helpers", "misc", "util", "utils"}
REFUSED_TWINS = re.compile(r"(async_|batched_|abatch_).*|.*_(nowait|async|sync|batched)")
FILE_BYTES_MAX = 300_000

FACES = {"Core"}
"""What everything above calls as a whole: no port, of which a backend has to implement every method."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@cache
def nodes(*kinds: type) -> list[tuple[Path, ast.AST]]:
    return [(path, node) for path in MODULES for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]


def is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and "Protocol" in bases(node)


def is_property(node: ast.AST) -> bool:
    return isinstance(node, Function) and any(ast.unparse(each) == "property" for each in node.decorator_list)


def is_testing(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tiercache" / "testing")


def public(name: str) -> bool:
    return not name.startswith("_")


def report(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_modules_are_short() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in MODULES}
    report(
        [
            f"{p.relative_to(ROOT)}: {n} lines, at most {MODULE_LINES_MAX}"
            for p, n in sizes.items()
            if n > MODULE_LINES_MAX
        ]
    )


def test_functions_are_short() -> None:
    found = []
    for path, node in nodes(*Function.__args__):
        body = node.body
        docstring = ast.get_docstring(node, clean=False) is not None
        lines = node.end_lineno - node.lineno + 1 - ((body[0].end_lineno - body[0].lineno + 1) if docstring else 0)
        if lines > FUNCTION_LINES_MAX:
            found.append(f"{place(path, node)}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}")
    report(found)


def test_functions_take_few_positional_arguments() -> None:
    found = []
    for path, node in nodes(*Function.__args__):
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
        if len(names) > POSITIONAL_MAX:
            found.append(f"{place(path, node)}: {node.name} has {len(names)}, at most {POSITIONAL_MAX}; use keywords")
    report(found)


def test_classes_are_named_for_a_concept() -> None:
    report([f"{place(p, n)}: {n.name}" for p, n in nodes(ast.ClassDef) if n.name.endswith(REFUSED_SUFFIXES)])


def test_modules_are_named_for_a_concept() -> None:
    report([place(path, tree(path)) for path in MODULES if path.stem in REFUSED_MODULES])


def test_no_twins_of_one_verb() -> None:
    report(
        [
            f"{place(p, n)}: {n.name}"
            for p, n in nodes(*Function.__args__)
            if public(n.name) and REFUSED_TWINS.fullmatch(n.name)
        ]
    )


def test_ports_are_small() -> None:
    found = []
    for path, node in nodes(ast.ClassDef):
        methods = [each for each in node.body if isinstance(each, Function) and not is_property(each)]
        if is_protocol(node) and len(methods) > PROTOCOL_METHODS_MAX and node.name not in FACES:
            found.append(f"{place(path, node)}: {node.name} has {len(methods)} methods, at most {PROTOCOL_METHODS_MAX}")
    report(found)


def test_inheritance_has_depth_one() -> None:
    classes = {node.name: node for path, node in nodes(ast.ClassDef) if path.stem != "errors" and not is_protocol(node)}
    found = []
    for path, node in nodes(ast.ClassDef):
        parents = [classes[name] for name in bases(node) if name in classes and not is_testing(path)]
        found += [f"{place(path, node)}: {node.name}" for parent in parents if any(b in classes for b in bases(parent))]
    report(found)


@cache
def known_bases() -> set[str]:
    return {each.name for _, each in nodes(ast.ClassDef)} | {"Protocol", "NamedTuple", "Enum", "IntEnum", "Generic"}


def answers_to_a_host(node: ast.AST) -> bool:
    """Whether a class implements somebody else's interface, whose methods are documented there."""
    return isinstance(node, ast.ClassDef) and any(name not in known_bases() for name in bases(node))


def test_public_names_have_docstrings() -> None:
    """Methods that a port of ours or a host documents need no second docstring."""
    protocols = [node for _, node in nodes(ast.ClassDef) if is_protocol(node)]
    documented = {each.name for node in protocols for each in node.body if isinstance(each, Function)}
    found = []
    for path in MODULES:
        if not ast.get_docstring(tree(path)):
            found.append(f"{path.relative_to(ROOT)}: module")
        for node in tree(path).body:
            if not isinstance(node, Function | ast.ClassDef) or not public(node.name):
                continue
            if not ast.get_docstring(node):
                found.append(f"{place(path, node)}: {node.name}")
            for each in node.body if isinstance(node, ast.ClassDef) and not answers_to_a_host(node) else []:
                known = is_property(each) if is_protocol(node) else getattr(each, "name", "") in documented
                if isinstance(each, Function) and public(each.name) and not known and not ast.get_docstring(each):
                    found.append(f"{place(path, each)}: {node.name}.{each.name}")
    report(found)


def test_annotations_are_lazy() -> None:
    found = []
    for path in MODULES:
        body = [node for node in tree(path).body if not isinstance(node, ast.Expr)]
        lazy = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body)
        if any(isinstance(node, Function | ast.ClassDef) for node in body) and not lazy:
            found.append(f"{path.relative_to(ROOT)}: from __future__ import annotations")
    report(found)


def test_nothing_is_left_open() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError$")
    lines = [(path, i, line) for path in MODULES for i, line in enumerate(path.read_text().splitlines(), 1)]
    report([f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for path, i, line in lines if words.search(line)])


def test_only_settings_read_the_environment() -> None:
    names = {"environ", "environb", "getenv"}
    found = [(p, n) for p, n in nodes(ast.Attribute) if n.attr in names and ast.unparse(n.value) == "os"]
    report([place(p, n) for p, n in found if p.name != "settings.py" and not is_testing(p)])


def test_every_task_has_an_owner() -> None:
    """A task is made by a TaskGroup, or kept: one whose result is dropped can vanish, and its fault with it."""
    found = []
    for path, node in nodes(ast.Expr):
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute | ast.Name):
            text = ast.unparse(call.func)
            if text.split(".")[-1] in ("create_task", "ensure_future") and "group" not in text.lower():
                found.append(f"{place(path, node)}: {text}")
    report(found)


def test_asserts_state_our_invariants() -> None:
    """`assert False` would let a wrong state pass under -O, and `raise AssertionError` says the same and stays."""
    found = [(p, n) for p, n in nodes(ast.Assert) if isinstance(n.test, ast.Constant | ast.Tuple)]
    report([place(path, node) for path, node in found])


def test_no_large_files() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    report([f"{p.relative_to(ROOT)}" for p in paths if p.is_file() and p.stat().st_size > FILE_BYTES_MAX])

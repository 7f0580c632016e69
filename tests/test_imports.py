"""Modules import one another in one direction: what is in a circle can be read, tested and moved only as a whole."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

ROOTS = ROOT / "recipes", ROOT / "scripts"


def imports(file: Path, roots: tuple[Path, ...] = ROOTS) -> set[Path]:
    """The files of ours that a file imports, at its top or within a function; not those for annotations alone."""
    return {
        found
        for name in _names(ast.parse(file.read_text(encoding="utf-8")))
        if (found := _file_of(name, (*roots, file.parent))) and found != file
    }


def _names(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (name for branch in child.orelse for name in _names(branch))
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # no expression has an import
            yield from _names(child)


def _file_of(name: str, folders: tuple[Path, ...]) -> Path | None:
    """The module `name`, or the one that has the last part of `name` in it."""
    for path in (name.replace(".", "/"), name.rpartition(".")[0].replace(".", "/")):
        for folder in folders if path else ():
            for file in (folder / f"{path}.py", folder / path / "__init__.py"):
                if file.is_file():
                    return file
    return None


def in_order(roots: tuple[Path, ...] = ROOTS) -> list[Path]:
    """All modules, each after those that it imports. Raises graphlib.CycleError, which has a circle, where none is."""
    graph = {file: imports(file, roots) for root in roots for file in sorted(root.rglob("*.py"))}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_module_imports_itself_by_way_of_others():
    order = [str(file.relative_to(ROOT)) for file in in_order()]
    assert order.index("recipes/common/run/files.py") < order.index("recipes/common/run/folder.py")
    assert order.index("scripts/install/installed.py") < order.index("scripts/launch/__main__.py")
    assert order.index("scripts/tiny/compare_prompts.py") < order.index("scripts/tiny/samples.py")


def test_a_circle_is_found_where_an_import_is_within_a_function(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "one.py").write_text("from room import two\n")
    (tmp_path / "room" / "two.py").write_text("if TYPE_CHECKING:\n    from room.one import One\n")
    assert [file.stem for file in in_order((tmp_path,))] == ["two", "one"]
    (tmp_path / "room" / "two.py").write_text("def late():\n    from room.one import One\n")
    with pytest.raises(graphlib.CycleError, match=r"one\.py.*two\.py|two\.py.*one\.py"):
        in_order((tmp_path,))

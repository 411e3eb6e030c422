"""The house rules that a machine can see: folders, links, the import table, the error tree, module sizes and opening docstrings."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from kvfs.common import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kvfs"

# design.md, "The house": what each folder may import of ours, beside itself and the package's __init__.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"batch", "inference", "kvcache", "fuse", "client", "storage", "meta", "common"},
    "batch": {"client", "common"},
    "inference": {"kvcache", "client", "common"},
    "kvcache": {"client", "common"},
    "fuse": {"client", "common"},
    "client": {"common"},
    "storage": {"common"},
    "meta": {"common"},
    "common": set(),
}
MAX_MODULE_LINES = 600


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if not path.name.endswith("_pb2.py"))


ALL_MODULES = [path for folder in MAY_IMPORT for path in modules(folder)]


def test_every_folder_is_linked_into_the_package_by_a_relative_link() -> None:
    for folder in MAY_IMPORT:
        link = SOURCE / folder
        assert link.is_symlink(), f"src/kvfs/{folder} must be a symbolic link"
        assert os.readlink(link) == f"../../{folder}"
        assert (ROOT / folder / "__init__.py").is_file()
    assert {entry.name for entry in SOURCE.iterdir() if entry.name != "__pycache__"} == {*MAY_IMPORT, "__init__.py", "py.typed"}


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write `from kvfs...`"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down_the_table(folder: str) -> None:
    for path in modules(folder):
        for name in imported_modules(path):
            parts = name.split(".")
            assert parts[0] not in MAY_IMPORT, f"{path}: bare import of {name}; write `from kvfs.{name}`"
            if parts[0] == "kvfs" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                assert parts[1] == folder or parts[1] in MAY_IMPORT[folder], (
                    f"{path.relative_to(ROOT)} imports {name}: {folder} may not import {parts[1]}"
                )


def test_protocol_cores_do_no_io() -> None:
    """state and event in, effects out: no trio, no sockets, no files in the pure cores."""
    cores = [ROOT / "meta" / "cluster" / "states.py", *modules("storage/chain")]
    assert len(cores) > 1
    for path in cores:
        banned = {"trio", "os", "socket", "time", "random", "threading", "lmdb"} & {name.split(".")[0] for name in imported_modules(path)}
        assert not banned, f"{path.relative_to(ROOT)} is a protocol core and imports {sorted(banned)}"


def test_only_the_boundaries_read_clocks() -> None:
    """Clock and Random are boundaries: nothing else of a service reads time or draws random numbers, or a simulation could not replay it."""
    for folder in ("meta", "storage", "client"):
        for path in modules(folder):
            banned = {"time", "random", "secrets", "uuid"} & {name.split(".")[0] for name in imported_modules(path)}
            assert not banned, f"{path.relative_to(ROOT)} imports {sorted(banned)}; use kvfs.common.boundary"


@pytest.mark.parametrize("path", ALL_MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_open_with_what_they_own_and_stay_small(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module opens with a docstring: what it owns, its invariants, what it must never do"
    assert text.count("\n") <= MAX_MODULE_LINES, f"over {MAX_MODULE_LINES} lines: is it one noun?"


def test_error_tree_is_total() -> None:
    """Every class has a wire code of its own, an errno, and comes back from the wire as itself."""
    classes = errors._all_classes(errors.KvfsError)
    assert len(classes) > 60
    assert len({cls.code for cls in classes}) == len(classes), "two classes share a wire code"
    for cls in classes:
        assert "code" in vars(cls), f"{cls.__name__} has no wire code of its own"
        assert 0 < cls.errno < 200
        back = errors.from_wire(cls.code, "why")
        assert type(back) is cls and back.message == "why" and str(back) == "why"
    unknown = errors.from_wire(9999, "new")
    assert type(unknown) is errors.KvfsError and "9999" in unknown.message


def test_operating_system_errors_find_their_class() -> None:
    for cls in errors.FsError.__subclasses__():
        if cls is errors.QuotaExceeded:  # a full quota of the disk below is a full disk to those above
            continue
        assert type(errors.from_os(OSError(cls.errno, "x"), "step")) is cls

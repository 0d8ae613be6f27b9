# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that no linter knows: read from the code itself."""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "access",
    "archiver",
    "clusters",
    "control",
    "crypt",
    "fleet",
    "places",
    "producer",
    "protocol",
    "restore",
    "runtime",
    "vma",
)
PURE_ROOMS = ("clusters", "crypt", "protocol", "vma")

# A library that only these files import, so that it can be replaced, limited
# and reasoned about in one place. The next file goes on this list with thought.
ONLY_IN = {
    "zmq": {
        "archiver/listener/socket.py",
        "archiver/listener/curve.py",
        "archiver/service/server.py",
        "control/cli/keygen.py",
        "producer/connection.py",
        "restore/workers/sockets.py",
    },
    "msgpack": {"protocol/schema.py"},
    "xxhash": {"archiver/outputs/manifests.py", "restore/archive/digest.py"},
    "zstandard": set[str](),  # in tests: another library's opinion on our frames
    "backports": {"archiver/outputs/compress.py", "restore/archive/zstd.py"},
    "compression": {"archiver/outputs/compress.py", "restore/archive/zstd.py"},
    "qemu": set[str](),  # a second opinion in tests: the foreign client,
    "pytsk3": {
        "access/files/parser.py",
        "access/files/image.py",
    },  # C, and its input is a stranger's
    "mfusepy": {"access/mount/fuse.py"},
    "cryptography": {"access/files/luks.py", "crypt/primitives.py"},
    "lzallright": {"access/lzo.py"},
    "libvirt": {"control/hosts/libvirt/connect.py"},
    "jinja2": {"fleet/report/page.py"},
    "botocore": {"runtime/objectstore.py"},
    "procrastinate": {"fleet/engine.py"},
    "psycopg": {"fleet/engine.py"},
    "yaml": {"fleet/ansible.py"},
    "dissect": set[str](),  # for tests: another project's reader, under another licence
}

# All that a pure room may import. What is missing reaches out (files, sockets,
# processes, threads, clocks, chance, the terminal) or was not needed yet; time
# and chance come in as arguments.
PURE_MODULES = {
    "__future__",
    "abc",
    "array",
    "base64",
    "binascii",
    "bisect",
    "collections",
    "cryptography",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "itertools",
    "json",
    "math",
    "msgpack",
    "operator",
    "re",
    "struct",
    "typing",
    "uuid",
    "vmapipe",
    "zlib",
}
IMPURE_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open", "print"}

SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "node_modules", "typepath"}


class Import(NamedTuple):
    """One imported module: `file` is relative to the root."""

    file: str
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


@functools.cache
def code_files() -> list[str]:
    """Every file with code of ours: Python by name, and any script by its first line."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not _is_skipped(name)]
        paths = [Path(folder, name) for name in files]
        found += [str(path.relative_to(ROOT)) for path in paths if _is_code(path)]
    return sorted(found)


def _is_skipped(folder: str) -> bool:
    hidden = folder.startswith(".") and folder != ".ci"
    return hidden or folder in SKIPPED_FOLDERS or folder.endswith(".egg-info")


def _is_code(path: Path) -> bool:
    if path.suffix in (".py", ".pyi", ".sh"):
        return True
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def python_files(*folders: str) -> list[str]:
    """Ours below these folders; without folders all of them."""
    files = [file for file in code_files() if file.endswith(".py")]
    return [
        file for file in files if not folders or file.startswith(tuple(f"{f}/" for f in folders))
    ]


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


@functools.cache
def imports_of(file: str) -> list[Import]:
    """All imports, also those inside functions. `from a import b` counts as a and as a.b."""
    return list(_imports_of(file))


def _imports_of(file: str) -> Iterator[Import]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield Import(file, node.lineno, module)
            yield from (Import(file, node.lineno, f"{module}.{alias.name}") for alias in node.names)


def named_calls_of(file: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node


@functools.cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_code_file_names_its_licence() -> None:
    unnamed = []
    for file in code_files():
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines() or [""]
        place = 1 if lines[0].startswith("#!") else 0
        if lines[place : place + 1] != ["# SPDX-License-Identifier: Apache-2.0"]:
            unnamed.append(file)
    assert unnamed == []


def test_no_stream_that_is_read_has_two_writers() -> None:
    """One's words would come in the middle of the other's line, once in a hundred runs."""
    merged = f"stderr=subprocess.{'STDOUT'}"
    files = [file for file in python_files("tests", *ROOMS) if merged in (ROOT / file).read_text()]
    assert files == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_guarded_library_is_imported_only_by_its_files(library: str) -> None:
    others = [
        str(imported)
        for file in python_files(*ROOMS)
        if file not in ONLY_IN[library]
        for imported in imports_of(file)
        if imported.top == library
    ]
    assert others == []


def test_pure_rooms_import_only_what_cannot_reach_out() -> None:
    reaching = [
        str(imported)
        for file in python_files(*PURE_ROOMS)
        for imported in imports_of(file)
        if imported.top not in PURE_MODULES
    ]
    assert reaching == []


def test_pure_rooms_call_no_builtin_that_reaches_out() -> None:
    calls = [
        f"{file}:{call.lineno} calls {name}"
        for file in python_files(*PURE_ROOMS)
        for name, call in named_calls_of(file)
        if name in IMPURE_BUILTINS
    ]
    assert calls == []


def test_only_the_command_line_prints_to_standard_output() -> None:
    """Standard output may be the archive: whoever prints says where to."""
    prints = [
        f"{file}:{call.lineno} prints"
        for file in python_files(*set(ROOMS) - {"control"})
        for name, call in named_calls_of(file)
        if name == "print" and "file" not in [keyword.arg for keyword in call.keywords]
    ]
    assert prints == []


def test_no_room_is_imported_by_its_bare_name_or_relatively() -> None:
    bare = [
        str(imported)
        for file in python_files()
        for imported in imports_of(file)
        if imported.top in (*ROOMS, "typepath", "")
    ]
    assert bare == []


def test_every_room_is_mapped_linted_and_known_to_the_type_checkers() -> None:
    names = [f"vmapipe.{room}" for room in ROOMS]
    assert pyproject()["tool"]["setuptools"]["package-dir"] == dict(zip(names, ROOMS, strict=True))
    assert pyproject()["tool"]["importlinter"]["root_packages"] == names
    links = sorted((ROOT / "typepath" / "vmapipe").iterdir())
    assert [str(link.readlink()) for link in links] == [f"../../{room}" for room in ROOMS]


def test_every_folder_of_a_room_is_a_listed_package() -> None:
    folders = {Path(file).parent for file in python_files(*ROOMS)}
    packages = sorted("vmapipe." + ".".join(folder.parts) for folder in folders)
    assert pyproject()["tool"]["setuptools"]["packages"] == packages
    assert [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").is_file()] == []


def test_no_folder_shadows_the_namespace() -> None:
    assert not (ROOT / "vmapipe").exists()


@functools.cache
def house() -> Any:
    """scripts/house as a module."""
    loader = SourceFileLoader("house", str(ROOT / "scripts" / "house"))
    spec = spec_from_loader("house", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["house"] = module  # its NamedTuple looks for its module there
    loader.exec_module(module)
    return module


@functools.cache
def modules() -> dict[str, Any]:
    """Every file of the product, as scripts/house has parsed it."""
    found: dict[str, Any] = house().modules()
    return found


def test_no_file_has_more_than_500_lines() -> None:
    assert {f: m.lines for f, m in modules().items() if m.lines > 500} == {}


def test_no_folder_imports_itself_by_way_of_others() -> None:
    assert house().folders_in_cycles(modules()) == []


# The same idea on both sides of a wire, as the docstrings say.
TWO_SIDES: set[str] = set()


def test_no_class_name_means_two_things() -> None:
    assert set(house().classes_of_one_name(modules())) == TWO_SIDES


def test_every_file_that_a_folder_tells_to_read_is_there() -> None:
    gone = [
        f"{init.parent.relative_to(ROOT)}: {name}"
        for init in sorted(file for room in ROOMS for file in (ROOT / room).rglob("__init__.py"))
        for name in re.findall(r"[\w/]+\.py", ast.get_docstring(ast.parse(init.read_text())) or "")
        # Beside it, or of the room that it belongs to.
        if not any((folder / name).is_file() for folder in (init.parent, *init.parent.parents))
    ]
    assert gone == []


def test_the_architecture_page_has_every_file_as_it_is() -> None:
    assert house().written_tree() == house().tree(), "run scripts/house tree --write"

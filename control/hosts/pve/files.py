# SPDX-License-Identifier: Apache-2.0
"""The files of a Proxmox VE node: of the one that runs here, or of a dead one whose disk is mounted.

/etc/pve is a file system of its own (pmxcfs), which is there while the node runs. What is in it lies in
a database, which is read where the node itself does not run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping

from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import temporary_folder
from vmapipe.runtime.side_files import open_regular

_DATABASE = "/var/lib/pve-cluster/config.db"
_PVE = "/etc/pve"
# pmxcfs itself takes no larger file.
_MAX_BYTES = 1 << 20
# Its root, and the kinds of its entries (pmxcfs: memdb.h); each entry names the folder that it is in.
_ROOT, _FILE = 0, 8
# Far deeper than pmxcfs' folders are.
_MAX_DEPTH = 16


class NodeFiles:
    """Files by their paths on the node, wherever they are for us. All but `path` raise Failure."""

    def __init__(self, root: str) -> None:
        """Raises Failure where there is no node of Proxmox VE."""
        self._root = os.path.abspath(root or "/").rstrip("/")
        self._stored: Mapping[str, str] | None = None
        if not self._list(_PVE):
            if not self._root or not os.path.exists(self.path(_DATABASE)):
                raise Failure(
                    f"{self.path(_PVE)}: no Proxmox VE is here (or its service pve-cluster does not run): "
                    "--pve is for its nodes; for other machines see --qmp and --disk"
                )
            self._stored = _read_database(self.path(_DATABASE))

    @property
    def is_elsewhere(self) -> bool:
        """True when the node's files lie below another folder than /."""
        return bool(self._root)

    @property
    def is_dead(self) -> bool:
        """True for a node that does not run: its configurations are read from the database."""
        return self._stored is not None

    def path(self, path: str) -> str:
        """Return where a file of the node is for us. A path that names the other folder itself stays."""
        is_ours = bool(self._root) and path.startswith(f"{self._root}/")
        return path if is_ours else self._root + path

    def text(self, path: str) -> str:
        """Return a file's text; empty: it is not there."""
        if self._stored is not None and path.startswith(f"{_PVE}/"):
            return self._stored.get(path.removeprefix(f"{_PVE}/"), "")
        try:
            fd = open_regular(self.path(path))
            with open(fd, "rb") as file:
                return file.read(_MAX_BYTES).decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise Failure(f"cannot read {self.path(path)}: {os_error_text(error)}") from error

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder below /etc/pve; none: it is not there."""
        if self._stored is None:
            return self._list(folder)
        prefix = f"{folder.removeprefix(_PVE).lstrip('/')}/"
        inside = (path.removeprefix(prefix) for path in self._stored if path.startswith(prefix))
        return sorted({path.partition("/")[0] for path in inside})

    def _list(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise Failure(
                f"cannot look into {self.path(folder)}: {os_error_text(error)}"
            ) from error


def _read_database(path: str) -> dict[str, str]:
    """Return the files of pmxcfs' database, by their paths in it. Raises Failure."""
    try:
        # A copy: the disk may be mounted read-only, and what a crash has left in the log counts.
        with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
            copied = shutil.copyfile(path, f"{folder}/config.db")
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}-wal", f"{copied}-wal")
            with contextlib.closing(sqlite3.connect(copied)) as database:
                rows = database.execute(
                    "SELECT inode, parent, type, name, data FROM tree "
                    "WHERE length(data) <= ? OR data IS NULL",
                    (_MAX_BYTES,),
                ).fetchall()
    except OSError as error:
        raise Failure(f"cannot read {path}: {os_error_text(error)}") from error
    except sqlite3.Error as error:
        raise Failure(f"cannot read {path}: {error}") from error
    entries = {row[0]: row for row in rows}
    found = {}
    for inode, parent, kind, name, data in rows:
        if kind != _FILE or inode == _ROOT:
            continue
        parts = [str(name)]
        while parent != _ROOT and parent in entries and len(parts) < _MAX_DEPTH:
            parts.append(str(entries[parent][3]))
            parent = entries[parent][1]  # noqa: PLW2901  up to the root
        content = data if isinstance(data, bytes) else str(data or "").encode()
        found["/".join(reversed(parts))] = content.decode("utf-8", "surrogateescape")
    return found

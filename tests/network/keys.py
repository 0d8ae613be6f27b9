# SPDX-License-Identifier: Apache-2.0
"""Folders of keys for tests: a server, and clients that it may know."""

from __future__ import annotations

import shutil
from pathlib import Path

from vmapipe.control.cli.keygen import new_pair
from vmapipe.runtime.keys import write_pair


def make_server(folder: Path) -> Path:
    write_pair(str(folder), "server", new_pair())
    return folder


def make_client(folder: Path, server: Path, name: str = "") -> Path:
    """A client that knows `server`; with a name the server knows it, too."""
    write_pair(str(folder), "client", new_pair())
    shutil.copy(server / "server.pub", folder)
    if name:
        enrol(folder, server, name)
    return folder


def enrol(client: Path, server: Path, name: str) -> Path:
    return Path(shutil.copy(client / "client.pub", server / "clients" / f"{name}.pub"))

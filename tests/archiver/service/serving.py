# SPDX-License-Identifier: Apache-2.0
"""`vmapipe archiver --directory`, run as a user runs it, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.machine import LIMIT_S, children, next_event, started
from tests.network.keys import make_client, make_server


class Served:
    """A service: where it listens, where its archives go, and how one comes to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], endpoint: str, folder: Path, link: tuple[str, ...]
    ) -> None:
        self.process = process
        self.endpoint = endpoint
        self.folder = folder
        self.link = link

    @property
    def words(self) -> tuple[str, ...]:
        """Options of a backup that goes here."""
        return ("--archiver", self.endpoint, *self.link)

    def stored(self) -> set[str]:
        """Every file below the folder."""
        return {str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file()}

    def archivers(self) -> list[psutil.Process]:
        return children(self.process, "vmapipe.archiver.main")

    def rss_peak_bytes(self) -> int:
        """The most memory that the front process ever had."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def next_event(self, name: str) -> dict[str, Any]:
        return next_event(self.process, name)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> list[dict[str, Any]]:
        """Ends it; what it has logged meanwhile. It must end well."""
        self.process.send_signal(signum)
        stdout, stderr = self.process.communicate(timeout=LIMIT_S)
        assert stderr == b"", stderr.decode()
        assert self.process.returncode == 0
        return [json.loads(line) for line in stdout.splitlines()]


@contextlib.contextmanager
def serving(
    folder: Path,
    *options: str,
    keys: tuple[Path, Path] | None = None,
    store: str = "",
    **more: Any,
) -> Iterator[Served]:
    """Killed at the end if it still runs.

    `keys`: the service's folder of keys, and a client's. `store`: where archives
    go instead of the folder.
    """
    folder.mkdir(exist_ok=True)
    server = ("--keys", str(keys[0])) if keys else ("--insecure-plain-tcp",)
    link = ("--keys", str(keys[1])) if keys else ("--insecure-plain-tcp",)
    place = ("--output", store) if store else ("--directory", str(folder))
    words = ("--listen", "tcp://127.0.0.1:*", *place, "--json", *server)
    with started("archiver", *words, *options, **more) as process:
        ready = next_event(process, "ready")
        yield Served(process, ready["listen"], folder, link)


def make_keys(folder: Path, *clients: str) -> tuple[Path, dict[str, Path]]:
    """A service's keys, and those of some clients that it lets in."""
    server = make_server(folder / "server")
    return server, {name: make_client(folder / name, server, name) for name in clients}

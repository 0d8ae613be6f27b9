# SPDX-License-Identifier: Apache-2.0
"""NBD servers of one raw image each: `vmapipe monitor` and its peers."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.place import VMAPIPE

_START_S = 30.0
_POLL_S = 0.02


class Served:
    """A running server: where clients go and, for ours, where backups go."""

    def __init__(self, name: str, uri: str, monitor: Path | None = None) -> None:
        self.name = name
        self.uri = uri
        self.monitor = monitor


@contextlib.contextmanager
def _process(*words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs while the block does."""
    with subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def vmapipe(image: Path, folder: Path) -> Iterator[Served]:
    monitor, sock = folder / "monitor.sock", folder / "vmapipe.sock"
    words = (*VMAPIPE, "monitor", "--json", "--listen", str(monitor))
    with _process(*words, "--disk", f"d={image}", "--export", f"d={sock}") as process:
        wait_for_event(process)
        yield Served("vmapipe", f"nbd+unix:///d?socket={sock}", monitor)


def wait_for_event(process: subprocess.Popen[bytes], event: str = "ready") -> None:
    """Reads a command's JSON events up to `event`."""
    for line in process.stdout or ():
        if json.loads(line)["event"] == event:
            return
    raise SystemExit(f"a vmapipe command ended without the event {event!r}")


@contextlib.contextmanager
def archive(path: Path, folder: Path) -> Iterator[Served]:
    """An archive of one disk, served without a restore."""
    sock = folder / "archive.sock"
    words = (*VMAPIPE, "serve", "--json", "--no-index-cache", "--listen", sock, path)
    with _process(*words) as process:
        wait_for_event(process, "exported")
        yield Served("vmapipe", f"nbd+unix:///drive-scsi0?socket={sock}")


@contextlib.contextmanager
def nbdkit(image: Path, folder: Path) -> Iterator[Served]:
    sock = folder / "nbdkit.sock"
    # The one before has left it, and it binds to no name that is there.
    sock.unlink(missing_ok=True)
    with _process("nbdkit", "-f", "-U", sock, "file", image):
        _wait_for(sock)
        yield Served("nbdkit file", f"nbd+unix:///?socket={sock}")


@contextlib.contextmanager
def qemu_nbd(image: Path, folder: Path) -> Iterator[Served]:
    sock = folder / "qemu-nbd.sock"
    with _process("qemu-nbd", "-t", "-f", "raw", "-e", "4", "-k", sock, image):
        _wait_for(sock)
        yield Served("qemu-nbd", f"nbd+unix:///?socket={sock}")


def _wait_for(path: Path) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + _START_S
    while True:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(path))
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"nobody listens on {path}") from None
        time.sleep(_POLL_S)


Start = Callable[[Path, Path], contextlib.AbstractContextManager[Served]]


def all_servers() -> list[Start]:
    """Ours first, then those peers that are installed."""
    peers: dict[str, Start] = {"nbdkit": nbdkit, "qemu-nbd": qemu_nbd}
    return [vmapipe, *(start for program, start in peers.items() if shutil.which(program))]

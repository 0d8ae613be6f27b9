# SPDX-License-Identifier: Apache-2.0
"""One target of every kind for archives, each with a way to see what arrived there."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from tests.archiver.memory import MemoryOutput
from vmapipe.archiver.outputs.base import Output
from vmapipe.archiver.outputs.compress import Compression, ZstdOutput
from vmapipe.archiver.outputs.file import FileOutput
from vmapipe.archiver.outputs.manifests import DigestedOutput, Digests, ManifestLines
from vmapipe.archiver.outputs.open import open_output
from vmapipe.runtime.cancel import Cancel

# Nothing here takes so long; only a hang meets it.
LIMIT_S = 60.0


class Reader:
    """Reads a descriptor to its end in a thread; `start` at once, or when a test says so."""

    def __init__(self, open_end: Callable[[], int]) -> None:
        self._data = bytearray()
        self._open_end = open_end
        self._go = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def start(self) -> None:
        self._go.set()

    def data(self) -> bytes:
        """All that came; the writer has closed its end."""
        self._go.set()
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the stream has no end"
        return bytes(self._data)

    def _run(self) -> None:
        fd = self._open_end()
        try:
            assert self._go.wait(LIMIT_S)
            with contextlib.suppress(ConnectionError):
                while piece := os.read(fd, 1 << 20):
                    self._data += piece
        finally:
            os.close(fd)


class Target(Protocol):
    """`asleep`: the far end takes nothing until it is woken or its data asked for."""

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output: ...
    def received(self) -> bytes: ...
    def left(self) -> bytes:
        """What an abandoned archive has left for good: nothing, for what can be taken back."""


class FileTarget:
    def __init__(self, folder: Path, *, replace: bool = False) -> None:
        self._folder = folder / "out"
        self._folder.mkdir()
        self._replace = replace

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        path = self._folder / "vm.vma"
        return FileOutput(str(path), replace=True) if self._replace else open_output(str(path))

    def received(self) -> bytes:
        assert [p.name for p in self._folder.iterdir()] == ["vm.vma"]
        return (self._folder / "vm.vma").read_bytes()

    def left(self) -> bytes:
        assert list(self._folder.iterdir()) == []
        return b""


class ReaderTarget:
    """Streams, with a reader at the far end."""

    def __init__(self) -> None:
        self.reader: Reader | None = None

    def _read(self, open_end: Callable[[], int], *, asleep: bool) -> None:
        self.reader = Reader(open_end)
        if not asleep:
            self.reader.start()

    def wake(self) -> None:
        assert self.reader is not None
        self.reader.start()

    def received(self) -> bytes:
        assert self.reader is not None
        return self.reader.data()

    def left(self) -> bytes:
        self.received()  # a stream cannot be taken back, but it ends
        return b""


class PipeTarget(ReaderTarget):
    def __init__(self, folder: Path, *, spec: str = "fd:{}") -> None:
        super().__init__()
        self._spec = spec

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        theirs, ours = os.pipe()
        self._read(lambda: theirs, asleep=asleep)
        return open_output(self._spec.format(ours), cancel=cancel)


class FifoTarget(ReaderTarget):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "fifo"
        os.mkfifo(self._path)

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        self._read(lambda: os.open(self._path, os.O_RDONLY), asleep=asleep)
        return open_output(str(self._path), cancel=cancel)


class SocketPairTarget(ReaderTarget):
    def __init__(self, folder: Path) -> None:
        super().__init__()

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        theirs, ours = socket.socketpair()
        number = theirs.detach()
        self._read(lambda: number, asleep=asleep)
        return open_output(f"fd:{ours.detach()}", cancel=cancel)


class UnixSocketTarget(ReaderTarget):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = str(folder / "socket")

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        listener.listen()

        def accept() -> int:
            with listener:
                return listener.accept()[0].detach()

        self._read(accept, asleep=asleep)
        return open_output(self._path, cancel=cancel)


class CommandTarget:
    def __init__(self, folder: Path) -> None:
        self._file = folder / "received"

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        if asleep:
            return open_output("exec:sleep 1000", cancel=cancel)
        return open_output(f"exec:cat > {self._file}")

    def received(self) -> bytes:
        return self._file.read_bytes()

    def left(self) -> bytes:
        return b""  # what a killed command leaves is its own affair


class OpenFileTarget:
    """A file that somebody else opened, with something in front."""

    def __init__(self, folder: Path, *, append: bool = False) -> None:
        self._path = folder / "open"
        self._path.write_bytes(b"before")
        self._flags = os.O_WRONLY | (os.O_APPEND if append else 0)

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        fd = os.open(self._path, self._flags)
        if not self._flags & os.O_APPEND:
            os.lseek(fd, 0, os.SEEK_END)
        return open_output(f"fd:{fd}")

    def received(self) -> bytes:
        data = self._path.read_bytes()
        assert data.startswith(b"before")
        return data.removeprefix(b"before")

    def left(self) -> bytes:
        return self.received()


class MemoryTarget:
    def __init__(self, folder: Path) -> None:
        self._output = MemoryOutput()

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        return self._output

    def received(self) -> bytes:
        return bytes(self._output.data)

    def left(self) -> bytes:
        return self.received()


class DigestedTarget(FileTarget):
    """A file with digests around it."""

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        return DigestedOutput(super().open(), Digests(ManifestLines(lambda line: None)))


class ZstdTarget(FileTarget):
    """A compressed file; `received` is what it means."""

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        return ZstdOutput(super().open(), Compression(threads=2))

    def received(self) -> bytes:
        return decompressed(super().received())


def decompressed(raw: bytes) -> bytes:
    """All frames of a zstd file, the skippable ones skipped."""
    with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
        return reader.read()


KINDS: dict[str, Callable[[Path], Target]] = {
    "file": FileTarget,
    "file that replaces": lambda folder: FileTarget(folder, replace=True),
    "pipe": PipeTarget,
    "fdset": lambda folder: PipeTarget(folder, spec="/dev/fdset/{}"),
    "FIFO": FifoTarget,
    "socket pair": SocketPairTarget,
    "Unix socket": UnixSocketTarget,
    "command": CommandTarget,
    "open file": OpenFileTarget,
    "open file to append to": lambda folder: OpenFileTarget(folder, append=True),
    "memory": MemoryTarget,
    "digested file": DigestedTarget,
    "compressed file": ZstdTarget,
}
#: Those whose far end can be slow.
BLOCKING_KINDS = ("pipe", "fdset", "FIFO", "socket pair", "Unix socket", "command")


@contextlib.contextmanager
def in_thread(work: Callable[[], None]) -> Iterator[list[Exception]]:
    """Run `work` beside the block; its error, if any, is in the list afterwards."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  whatever it is, the test looks at it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield errors
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "the thread hangs"

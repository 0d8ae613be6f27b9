# SPDX-License-Identifier: Apache-2.0
"""The asking side of a parser: starts it, answers its reads from the archive, gives its answers."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Self

from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.messages import (
    MAX_MESSAGE_BYTES,
    AnswerEnd,
    Ask,
    Bytes,
    DiskUnreadable,
    FromAsker,
    FromParser,
    Key,
    ParserReady,
    Read,
    Volume,
    decode_for_asker,
    encode,
)
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import temporary_folder

# A parser that says and asks nothing for so long has been sent round in a circle. The
# longest silence seen was 2 s, in a folder of 1,000,000 names.
_SILENCE_S = 120.0
# What it may answer to one command: a message each 128 KiB of a disk of 64 TiB.
_MAX_MESSAGES = 1 << 29


class EngineEnded(Failure):
    """An engine ended, or said what it must not."""


class FileReader:
    """An engine that is ready: it answers commands about all disks of an archive.

    Messages name a disk by its place in `names`: a logical volume may lie on several. A subclass
    carries messages to the side that reads and back; what that says is a stranger's.
    """

    names: list[str]

    def ask(
        self,
        action: str,
        disk: int = -1,
        where: bytes = b"",
        path: bytes = b"/",
        *,
        offset: int = 0,
        length: int = 0,
    ) -> Iterator[FromParser]:
        """`answers` to the command of these words."""
        return self.answers(Ask(action, disk, where, path, offset, length))

    def answers(self, asked: Ask) -> Iterator[FromParser]:
        """The answers to one command, less the reads. Raises Failure, Cancelled."""
        self._tell(asked)
        for _ in range(_MAX_MESSAGES):
            message = self._hear()
            match message:
                case AnswerEnd():
                    return
                case Read() | ParserReady():
                    self._serve(message)
                case Volume(disk=number) if number >= len(self.names):
                    raise self._error("it names a disk that it was not given")
                case _:
                    yield message
        raise self._error("its answer has no end")

    def place_of(self, volume: Volume) -> str:
        """Its name as it stands in a place: DISK, DISK:PARTITION or DISK/GROUP/VOLUME."""
        return place_of(self.names[volume.disk], volume)

    def close(self) -> None:
        """End the engine, at once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, message: FromAsker) -> None:
        """Send a message. Raises Failure."""
        raise NotImplementedError

    def _hear(self) -> FromParser:
        """Return the next message; no wait is endless. Raises Failure, Cancelled."""
        raise NotImplementedError

    def _serve(self, request: Read | ParserReady) -> None:
        """Answer what is no part of an answer. Raises Failure where that must not come."""
        raise NotImplementedError

    def _error(self, what: str) -> Failure:
        """Return the error for what the other side did."""
        raise NotImplementedError


class FileSession(FileReader):
    """One parser process for disks of an archive. Use as a context: it is killed at the end."""

    def __init__(
        self, disks: Sequence[tuple[str, ArchiveDisk]], cancel: Cancel, keys: Sequence[Key] = ()
    ) -> None:
        """Starts it. Raises Failure, Cancelled."""
        self.names = [name for name, _ in disks]
        self._disks = [disk for _, disk in disks]
        self._cancel = cancel
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Their own words, for the one line that tells how it ended.
        self._words = tempfile.TemporaryFile(dir=temporary_folder())  # noqa: SIM115  closed by __exit__
        command = [sys.executable, "-m", "vmapipe.access.files.child"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, *map(str, [theirs.fileno(), *(disk.size_bytes for _, disk in disks)])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                pass_fds=[theirs.fileno()],
                cwd="/",
            )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._sock, selectors.EVENT_READ)
        self._selector.register(cancel.fd, selectors.EVENT_READ)
        self.is_confined = False
        try:
            self._begin(keys)
        except BaseException:
            self.close()
            raise

    def _begin(self, keys: Sequence[Key]) -> None:
        first = self._hear()
        if not isinstance(first, ParserReady):
            raise self._error("it does not begin as it should")
        self.is_confined = first.is_confined
        for key in keys:
            self._tell(key)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        self._sock.close()
        self._words.close()

    def _serve(self, request: Read | ParserReady) -> None:
        if isinstance(request, ParserReady):
            raise self._error("it begins a second time")
        self._tell(self._read(*request))

    def _read(self, index: int, offset: int, length: int) -> FromAsker:
        if index >= len(self._disks):
            raise self._error("it reads a disk that it was not given")
        disk = self._disks[index]
        length = min(length, disk.size_bytes - offset)
        if length <= 0:
            return Bytes(b"")
        data = bytearray(length)
        try:
            disk.read(memoryview(data), offset)
        except OSError as error:
            return DiskUnreadable((error.strerror or str(error)).encode()[:400])
        return Bytes(bytes(data))

    def _tell(self, message: FromAsker) -> None:
        try:
            self._sock.sendall(encode(message))
        except OSError:
            raise self._error("it has ended") from None

    def _hear(self) -> FromParser:
        end = time.monotonic() + _SILENCE_S
        while True:
            ready = {key.fd for key, _ in self._selector.select(max(0.0, end - time.monotonic()))}
            if self._cancel.fd in ready:
                self._cancel.check()
            if self._sock.fileno() in ready:
                break
            if time.monotonic() >= end:
                raise self._error(f"it has been silent for {_SILENCE_S:.0f} s")
        try:
            raw = self._sock.recv(MAX_MESSAGE_BYTES)
            if raw:
                return decode_for_asker([raw])
        except RemoteProtocolError as error:
            raise self._error(f"it does not speak as it should ({error})") from error
        except OSError:
            pass
        raise self._error("it has ended")

    def _error(self, what: str) -> EngineEnded:
        """With how the process ended, if it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # It has closed its socket, so its end is a matter of moments.
            self._process.wait(1.0 if what == "it has ended" else 0)
        status = self._process.returncode
        how = ""
        if status is not None and status < 0:
            how = f" by signal {-status}"
        elif status:
            size = os.fstat(self._words.fileno()).st_size
            last = os.pread(self._words.fileno(), 400, max(0, size - 400)).decode(errors="replace")
            how = f" with exit code {status} ({(last.strip().splitlines() or ['?'])[-1]})"
        return EngineEnded(
            f"the parser of the file systems on {', '.join(self.names)} failed: {what}{how}; "
            "restore the disk, or serve it, to look at it with other tools"
        )


def place_of(disk: str, volume: Volume) -> str:
    """DISK, DISK:PARTITION or DISK/GROUP/VOLUME."""
    name = os.fsdecode(volume.name)
    return f"{disk}:{name}" if name and not name.startswith("/") else f"{disk}{name}"

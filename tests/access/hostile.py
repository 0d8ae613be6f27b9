# SPDX-License-Identifier: Apache-2.0
"""File systems, tables and headers that somebody has changed, and what `vmapipe files` does with them.

By hand: python -m tests.access.hostile KIND SECONDS [SEED]: mutations of one kind of image (or
`all`); each that ends the parser, or that gives a text which no other gave, is printed as a line of
hostile/kept.txt: the image, then OFFSET:BYTES (hex) that are written into it. The tests replay
those lines.

hostile/ holds small images of each kind, compressed, made with mke2fs, mkntfs, mkfs.fat, mkfs.exfat,
xorriso and lvm2: folders, files, links, holes, a device, a journal to replay, a compressed file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import lzma
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from unittest import mock

from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files import child, session
from vmapipe.access.files.copies import FolderWriter, TarWriter
from vmapipe.access.files.messages import (
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    Key,
    ParserNotice,
    Stretch,
    Volume,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure

FOLDER = Path(__file__).parent / "hostile"
KEPT = FOLDER / "kept.txt"
KEY = Key(-1, b"", b"key", b"the words of a key")
# A mutated image may hold endless files; what comes behind this is cut off.
_MOST_BYTES = 8 << 20
_MOST_MESSAGES = 20_000
_MOST_S = 20.0
# Less than the product's, so that a parser which is sent round in a circle costs less here.
_SILENCE_S = 25.0
Change = tuple[int, bytes]


class Outcome(NamedTuple):
    """How one image went. `words`: what was said, with numbers and names left out.

    `peak_bytes`: the memory that the parser took at the most, beyond what it was started with.
    """

    words: frozenset[str]
    has_parser_ended: bool
    seconds: float
    peak_bytes: int


class _Disk:
    def __init__(self, content: bytes) -> None:
        self.size_bytes = len(content)
        self._content = memoryview(content)

    def read(self, target: memoryview, offset: int) -> None:
        target[:] = self._content[offset : offset + len(target)]


class _Sink(io.RawIOBase):
    """Takes a stream, keeps nothing of it, and has an end."""

    def __init__(self) -> None:
        self._left = 16 * _MOST_BYTES

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise Failure("the stream is longer than the disk can be")
        return len(data)


class _Forked:
    """In the place of a process that is started: one that is forked has its imports done."""

    last: _Forked

    def __init__(self, words: list[str], *, stderr: Any, **_: object) -> None:
        self.returncode: int | None = None
        _Forked.last = self
        # What is forked has all memory of this process from the start, much of it if that tests more.
        self._at_start_bytes = _status_bytes(os.getpid(), "VmRSS")
        self.pid = os.fork()
        if not self.pid:
            os.dup2(stderr.fileno(), 2)
            os._exit(child.main(words[3:]))

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG if timeout is not None else 0)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired("parser", timeout or 0)
            else:
                time.sleep(0.001)
        return self.returncode

    def peak_bytes(self) -> int:
        return max(0, _status_bytes(self.pid, "VmHWM") - self._at_start_bytes)


def _status_bytes(pid: int, name: str) -> int:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        return int(text.partition(f"{name}:")[2].split()[0]) << 10
    return 0


@functools.cache
def image(name: str) -> bytes:
    return lzma.decompress((FOLDER / f"{name}.xz").read_bytes())


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.xz"))


def changed(name: str, changes: list[Change]) -> bytes:
    raw = bytearray(image(name))
    for offset, new in changes:
        raw[offset : offset + len(new)] = new
    return bytes(raw)


def run(content: bytes) -> Outcome:
    """List all volumes, and copy all files, to a tar stream and into a folder."""
    started = time.monotonic()
    said: set[str] = set()
    has_ended, peak = False, 0
    folder = tempfile.mkdtemp()
    fd = os.open(folder, os.O_RDONLY)
    cancel = Cancel()
    disk = cast(ArchiveDisk, _Disk(content))
    try:
        with (
            mock.patch.object(subprocess, "Popen", _Forked),
            mock.patch.object(session, "_SILENCE_S", _SILENCE_S),
            session.FileSession([("disk", disk)], cancel, [KEY]) as parser,
        ):
            for number, volume in enumerate(list(parser.ask("volumes"))[:20]):
                if not isinstance(volume, Volume):
                    said.add(_plain(str(volume)))
                    continue
                said.add(_plain(f"{volume.kind.decode()}: {volume.remark.decode()}"))
                if volume.can_read and not _copy(parser, volume, number, fd, said, started):
                    break
            peak = _Forked.last.peak_bytes()
    except session.EngineEnded as error:
        has_ended = True
        said.add(_plain(str(error)))
    finally:
        cancel.close()
        os.close(fd)
        for where, folders, _ in os.walk(folder):
            for name in folders:
                with contextlib.suppress(OSError):
                    os.chmod(os.path.join(where, name), 0o700)
        shutil.rmtree(folder)
    return Outcome(frozenset(said), has_ended, time.monotonic() - started, peak)


def _copy(
    parser: session.FileSession,
    volume: Volume,
    number: int,
    fd: int,
    said: set[str],
    started: float,
) -> bool:
    """Return False where it was cut off. Raises EngineEnded."""

    def report(text: str) -> None:
        said.add(_plain(text))

    writers: list[TarWriter | FolderWriter] = [
        TarWriter(cast(BinaryIO, _Sink()), b"/", report),
        FolderWriter(fd, b"/", b"%d" % number, report),
    ]
    try:
        return _copy_to(writers, parser.ask("read", volume.disk, volume.name), report, started)
    finally:
        _close(writers)


def _copy_to(
    all_writers: Sequence[TarWriter | FolderWriter],
    answer: Iterator[FromParser],
    report: Callable[[str], None],
    started: float,
) -> bool:
    data_bytes, writers = 0, list(all_writers)
    for count, message in enumerate(answer):
        match message:
            case EntryFailed(_, text) | ParserNotice(text):
                report(text.decode(errors="replace"))
            case FileData():
                data_bytes += len(message.data)
        for writer in list(writers):
            try:
                _feed(writer, message)
            except Failure as error:
                report(str(error))
                writers.remove(writer)
        is_late = count > _MOST_MESSAGES or time.monotonic() > started + _MOST_S
        if is_late or data_bytes > _MOST_BYTES or not writers:
            return False
    return True


def _close(writers: Sequence[TarWriter | FolderWriter]) -> None:
    """Until no folder is open: each that cannot be ended is one Failure."""
    for writer in writers:
        while isinstance(writer, FolderWriter):
            try:
                writer.close()
            except Failure:
                continue
            break


def _feed(writer: TarWriter | FolderWriter, message: FromParser) -> None:
    """Raises Failure."""
    match message:
        case Entry():
            writer.entry(message)
        case Stretch():
            writer.stretch(message)
        case FileData():
            writer.data(message)
        case EntryFailed():
            writer.failed("")


def _plain(text: str) -> str:
    text = re.sub(r"'.*?'|\".*?\"", "'…'", text)
    return re.sub(r"0x[0-9a-f]+|\d+", "N", text)[:200]


# --- mutations ---


def mutations(name: str, chance: random.Random) -> list[Change]:
    """Some bytes of the image's structures, replaced by what hurts most."""
    raw = image(name)
    places = _places(name)
    found = [_mutation(raw, places, chance) for _ in range(chance.choice([1, 1, 2, 3, 6]))]
    return [*found, *_checksums(name, changed(name, found))]


@functools.cache
def _places(name: str) -> list[int]:
    """Offsets of what is not zero and not the content of a file, 16 bytes wide."""
    raw, found = image(name), []
    for block in range(0, len(raw), 512):
        piece = raw[block : block + 512]
        if any(piece) and b"file content" not in piece:
            found += [block + at for at in range(0, 512, 16) if any(piece[at : at + 16])]
    return found


_NUMBERS = (
    0,
    1,
    2,
    5,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    (1 << 32) - 1,
)
_HUGE = ((1 << 60), (1 << 63) - 1, (1 << 63), (1 << 64) - 1)


def _mutation(raw: bytes, places: list[int], chance: random.Random) -> Change:
    at = chance.choice(places)
    other = chance.choice(places)
    value = int.from_bytes(raw[at : at + 4], "little") + chance.choice([-2, -1, 1, 2, 256])
    choices = [
        bytes([raw[at] ^ 1 << chance.randrange(8)]),
        chance.randbytes(chance.choice([1, 2, 4, 8])),
        struct.pack("<H", chance.choice(_NUMBERS) & 0xFFFF),
        struct.pack(chance.choice("<>") + "I", chance.choice(_NUMBERS)),
        struct.pack("<Q", chance.choice(_NUMBERS + _HUGE)),
        struct.pack("<I", value & 0xFFFFFFFF),
        raw[other : other + chance.choice([16, 32, 64, 512])],  # another structure's
    ]
    kind = chance.randrange(len(choices))
    width = (1, 1, 2, 4, 8, 4, 16)[kind]
    return at + chance.randrange(0, 16, width), choices[kind]


def _checksums(name: str, raw: bytes) -> list[Change]:
    """What the formats that have checksums would otherwise notice at once."""
    if name.startswith("gpt"):
        unit = 4096 if name == "gpt4k" else 512
        count, width = struct.unpack_from("<2I", raw, unit + 80)
        table = raw[2 * unit : 2 * unit + min(count * width, 1 << 16)]
        head = bytearray(raw[unit : unit + 92])
        struct.pack_into("<I", head, 88, zlib.crc32(table))
        struct.pack_into("<I", head, 16, 0)
        struct.pack_into("<I", head, 16, zlib.crc32(head))
        return [(unit, bytes(head))]
    if name == "lvm":
        at, length = struct.unpack_from("<QQ", raw, 4096 + 40)
        text = raw[4096 + at : 4096 + at + min(length, 1 << 20)]
        head = bytearray(raw[4096 : 4096 + 512])
        struct.pack_into("<I", head, 56, _lvm_sum(text))
        struct.pack_into("<I", head, 0, _lvm_sum(bytes(head[4:])))
        label = bytearray(raw[512:1024])
        struct.pack_into("<I", label, 16, _lvm_sum(bytes(label[20:])))
        return [(512, bytes(label)), (4096, bytes(head))]
    return []


def _lvm_sum(raw: bytes) -> int:
    return zlib.crc32(raw, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


# --- what is kept ---


def line_of(name: str, changes: list[Change]) -> str:
    return " ".join([name, *(f"{at}:{new.hex()}" for at, new in changes)])


def kept() -> Iterator[tuple[str, list[Change]]]:
    for line in KEPT.read_text(encoding="ascii").splitlines():
        name, *words = line.split()
        pairs = [word.split(":") for word in words]
        yield name, [(int(at), bytes.fromhex(new)) for at, new in pairs]


def main(kind: str, seconds: float, seed: int) -> None:
    kinds = names() if kind == "all" else [kind]
    known: set[str] = set()
    for name in kinds:
        known |= run(image(name)).words
    chance, count, ended, longest, peak = random.Random(seed), 0, 0, 0.0, 0
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            name = chance.choice(kinds)
            changes = mutations(name, chance)
            outcome = run(changed(name, changes))
            count, ended = count + 1, ended + outcome.has_parser_ended
            longest, peak = max(longest, outcome.seconds), max(peak, outcome.peak_bytes)
            if outcome.words - known:
                new = sorted(outcome.words - known)[:3]
                known |= outcome.words
                print(f"{count}: {outcome.seconds:.1f} s {new}", file=sys.stderr)
                print(line_of(name, changes), flush=True)
    finally:
        print(
            f"{count} images, {ended} ended their parser, longest {longest:.1f} s, "
            f"largest {peak >> 20} MiB",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)

# SPDX-License-Identifier: Apache-2.0
"""The file systems of one disk, read path by path as a kernel asks for them.

The engines are those of `vmapipe files`: parsers, each in a process without rights, and
one virtual machine for all disks, for what the parsers do not read. Their answers are a
stranger's: names that no folder can hold are left out, and ranges are checked.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from vmapipe.access.files.copies import shown
from vmapipe.access.files.engines import is_for_vm
from vmapipe.access.files.messages import (
    Ask,
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    ParserNotice,
    Volume,
)
from vmapipe.access.files.session import EngineEnded, FileReader, place_of
from vmapipe.runtime.errors import Cancelled, Failure, os_error_text

Report = Callable[[str], None]
Look = Callable[[Iterator[FromParser]], list[FromParser]]
# Entries that are remembered of a disk's folders: some 200 MiB at the very most, and more than `find`
# has in its hands at a time.
_MAX_ENTRIES = 200_000
# What readdir() of the C library takes as a name.
_MAX_NAME_BYTES = 255
# Lines that were told once are not told again; who makes more of them is not worth the memory.
_MAX_TOLD = 1000


class GuestReader:
    """An engine that is started when it is first asked, and once more when it has ended.

    It has one thread for all that is asked: an engine answers one command at a time, and the
    kernel ends its process when the thread that has started it does. Any thread may ask.
    """

    def __init__(self, name: str, start: Callable[[], FileReader]) -> None:
        """`start` may raise Failure or OSError."""
        self._name = name
        self._start = start
        self._thread = ThreadPoolExecutor(1, f"engine-{name}")
        self._reader: FileReader | None = None
        #: What it has answered to "volumes": they do not change.
        self.volumes: list[Volume] | None = None

    def ask(self, asked: Ask, look: Look) -> list[FromParser]:
        """Return what `look` makes of the answer. Raises what it raises, Failure, Cancelled."""
        return self._thread.submit(self._ask, asked, look).result()

    def close(self) -> None:
        """End the engine. What is being asked fails."""
        self._thread.submit(self._end)
        self._thread.shutdown(wait=False)

    # --- in the thread ---

    def _ask(self, asked: Ask, look: Look) -> list[FromParser]:
        was_there = self._reader is not None
        if self._reader is None:
            self._reader = self._started()
        try:
            return look(self._reader.answers(asked))
        except EngineEnded:
            self._end()
            if not was_there:
                raise
            return self._ask(asked, look)
        except Cancelled:
            raise
        except Failure:
            self._end()
            raise

    def _started(self) -> FileReader:
        try:
            return self._start()
        except OSError as error:
            why = os_error_text(error)
            raise Failure(f"{self._name}: cannot start what reads its files: {why}") from error

    def _end(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


class GuestDisk:
    """One disk's file systems. Every method may be called by any thread, and may raise OSError."""

    def __init__(
        self,
        name: str,
        index: int,
        report: Report,
        parser: GuestReader | None,
        vm: GuestReader | None,
    ) -> None:
        """`parser`, `vm`: the engines that are there; `index`: how they name this disk.

        With both, the virtual machine reads only what the parser does not, or not truly.
        """
        self._name = name
        self._index = index
        self._report = report
        self._parser = parser
        self._vm = vm
        # What is known of the disk belongs to whoever holds this.
        self._lock = threading.Lock()
        self._volumes: dict[bytes, Volume] | None = None
        self._in_vm: set[bytes] = set()
        self._folders: OrderedDict[tuple[bytes, bytes], dict[bytes, Entry]] = OrderedDict()
        self._entries = 0
        self._told: set[str] = set()

    def volumes(self) -> list[Volume]:
        """The file systems that can be read; the others are told once."""
        with self._lock:
            if self._volumes is None:
                self._volumes = self._find_volumes()
            return list(self._volumes.values())

    def entry(self, volume: bytes, path: bytes) -> Entry:
        """What has this path. Raises OSError (ENOENT)."""
        with self._lock:
            return self._entry(volume, path)

    def entries(self, volume: bytes, path: bytes) -> dict[bytes, Entry]:
        """The entries of a folder, by name."""
        with self._lock:
            return self._list(volume, path)

    def read(self, volume: bytes, path: bytes, offset: int, length: int) -> bytes:
        """Bytes of a file, holes as zeroes: all `length`, which the caller knows to be inside."""
        with self._lock:
            return self._read(volume, path, offset, length)

    # --- the lock is held ---

    def _find_volumes(self) -> dict[bytes, Volume]:
        found = self._volumes_of(self._parser) if self._parser else {}
        if self._vm and (not self._parser or any(map(is_for_vm, found.values()))):
            try:
                there = self._volumes_of(self._vm)
            except OSError:
                there = {}  # it was told why
            for name, volume in there.items():
                known = found.get(name)
                if known is None or (is_for_vm(known) and (volume.can_read or not known.can_read)):
                    found[name] = volume
                    self._in_vm.add(name)
        for volume in found.values():
            self._tell_of(volume)
        return {name: volume for name, volume in found.items() if volume.can_read}

    def _volumes_of(self, reader: GuestReader) -> dict[bytes, Volume]:
        if reader.volumes is None:
            answer = self._ask_reader(reader, Ask("volumes", -1, b"", b"/", 0, 0))
            reader.volumes = [message for message in answer if isinstance(message, Volume)]
        return {item.name: item for item in reader.volumes if item.disk == self._index}

    def _tell_of(self, volume: Volume) -> None:
        """Say what is not shown, or not as it was."""
        where = place_of(self._name, volume)
        kind, why = os.fsdecode(volume.kind), os.fsdecode(volume.remark)
        if volume.can_read:
            if why:
                self._tell(f"{where} ({kind}): {why}")
        elif self._in_vm and volume.kind.endswith(b"pool"):
            pass  # its volumes are shown
        elif not volume.is_container and volume.kind not in (b"", b"swap"):
            why = why or "its file system is not read here"
            self._tell(f"{where} ({kind}) is not shown: {why}")

    def _entry(self, volume: bytes, path: bytes) -> Entry:
        folder, _, name = path.rpartition(b"/")
        known = self._folders.get((volume, folder or b"/"))
        if known is not None and name:
            self._folders.move_to_end((volume, folder or b"/"))
            if name not in known:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            return known[name]
        for message in self._ask("entry", volume, path):
            if isinstance(message, Entry):
                return message
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _list(self, volume: bytes, path: bytes) -> dict[bytes, Entry]:
        key = volume, path
        known = self._folders.get(key)
        if known is not None:
            self._folders.move_to_end(key)
            return known
        prefix = path.rstrip(b"/") + b"/"
        found: dict[bytes, Entry] = {}
        for message in self._ask("list", volume, path):
            if not isinstance(message, Entry):
                continue
            name = message.path.removeprefix(prefix)
            if not message.path.startswith(prefix) or not _is_name(name):
                self._tell(
                    f"{self._name}: left out, for no folder here can have this name: {shown(name)}"
                )
                continue
            found[name] = message
        while self._folders and self._entries + len(found) > _MAX_ENTRIES:
            _, oldest = self._folders.popitem(last=False)
            self._entries -= len(oldest)
        self._folders[key] = found
        self._entries += len(found)
        return found

    def _read(self, volume: bytes, path: bytes, offset: int, length: int) -> bytes:
        data = bytearray(length)
        for message in self._ask("range", volume, path, offset, length):
            if isinstance(message, FileData):
                at = message.offset - offset
                if not 0 <= at <= length - len(message.data):
                    raise self._fault(
                        f"{shown(path)}: the parser sent bytes that were not asked for"
                    )
                data[at : at + len(message.data)] = message.data
        return bytes(data)

    def _ask(
        self, action: str, volume: bytes, path: bytes, offset: int = 0, length: int = 0
    ) -> list[FromParser]:
        reader = self._vm if volume in self._in_vm else self._parser
        if reader is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._ask_reader(reader, Ask(action, self._index, volume, path, offset, length))

    def _ask_reader(self, reader: GuestReader, asked: Ask) -> list[FromParser]:
        """The whole answer. Raises OSError."""
        try:
            return reader.ask(asked, lambda answer: list(self._looked_at(answer, asked.path)))
        except Cancelled as error:
            raise OSError(errno.EIO, str(error)) from error
        except Failure as error:
            raise self._fault(str(error)) from error

    def _looked_at(self, answer: Iterator[FromParser], path: bytes) -> Iterator[FromParser]:
        """The messages, less what is told; the answer is heard to its end even if it is too long."""
        failed = ""
        entries = 0
        for message in answer:
            match message:
                case ParserNotice(text):
                    self._tell(f"{self._name}: {os.fsdecode(text)}")
                case EntryFailed(where, reason):
                    failed = f"{self._name}: {shown(where or path)}: {os.fsdecode(reason)}"
                    self._tell(failed)
                    if where and where != path:
                        failed = ""  # an entry of a folder: the others are there
                case Entry() if entries >= _MAX_ENTRIES:
                    failed = (
                        f"{self._name}: {shown(path)} has more than {_MAX_ENTRIES} entries: "
                        "use vmapipe files ls"
                    )
                case _:
                    entries += 1
                    yield message
        if failed:
            raise self._fault(failed)

    def _fault(self, text: str) -> OSError:
        self._tell(text)
        return OSError(errno.EIO, text)

    def _tell(self, text: str) -> None:
        if text not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(text)
            self._report(text)


def _is_name(name: bytes) -> bool:
    plain = name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name
    return plain and len(name) <= _MAX_NAME_BYTES

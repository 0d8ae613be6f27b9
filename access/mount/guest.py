# SPDX-License-Identifier: Apache-2.0
"""The file systems of one disk, read path by path as a kernel asks for them.

Their parser is the one of `vmapipe files`, in its process without rights. Its answers are a
stranger's: names that no folder can hold are left out, and ranges are checked.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.copies import shown
from vmapipe.access.files.messages import (
    Entry,
    EntryFailed,
    FileData,
    FromParser,
    Key,
    ParserNotice,
    Volume,
)
from vmapipe.access.files.session import FileSession, ParserError, place_of
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, os_error_text

Report = Callable[[str], None]
# Entries that are remembered of a disk's folders: some 200 MiB at the very most, and more than `find`
# has in its hands at a time.
_MAX_ENTRIES = 200_000
# What readdir() of the C library takes as a name.
_MAX_NAME_BYTES = 255
# Lines that were told once are not told again; who makes more of them is not worth the memory.
_MAX_TOLD = 1000


class GuestDisk:
    """One disk's file systems. Every method may be called by any thread, and may raise OSError."""

    def __init__(
        self,
        disks: Sequence[tuple[str, ArchiveDisk]],
        index: int,
        cancel: Cancel,
        report: Report,
        keys: Sequence[Key] = (),
    ) -> None:
        """`disks`: all of the archive, for a logical volume that begins on this one may go on there."""
        self._disks = disks
        self._index = index
        self._keys = keys
        self._name = name = disks[index][0]
        self._cancel = cancel
        self._report = report
        # One thread for all that is asked: a parser answers one command at a time, and
        # the kernel ends it when the thread that has started it does.
        self._thread = ThreadPoolExecutor(1, f"parser-{name}")
        self._session: FileSession | None = None
        self._volumes: dict[bytes, Volume] | None = None
        self._folders: OrderedDict[tuple[bytes, bytes], dict[bytes, Entry]] = OrderedDict()
        self._entries = 0
        self._told: set[str] = set()

    def volumes(self) -> list[Volume]:
        """The file systems that can be read; the others are told once."""
        return self._thread.submit(self._find_volumes).result()

    def entry(self, volume: bytes, path: bytes) -> Entry:
        """What has this path. Raises OSError (ENOENT)."""
        return self._thread.submit(self._entry, volume, path).result()

    def entries(self, volume: bytes, path: bytes) -> dict[bytes, Entry]:
        """The entries of a folder, by name."""
        return self._thread.submit(self._list, volume, path).result()

    def read(self, volume: bytes, path: bytes, offset: int, length: int) -> bytes:
        """Bytes of a file, holes as zeroes: all `length`, which the caller knows to be inside."""
        return self._thread.submit(self._read, volume, path, offset, length).result()

    def close(self) -> None:
        """End the parser. What is being asked fails."""
        self._thread.submit(self._end_session)
        self._thread.shutdown(wait=False)

    # --- In the thread ---

    def _find_volumes(self) -> list[Volume]:
        if self._volumes is None:
            found = {}
            for message in self._ask("volumes"):
                if not isinstance(message, Volume) or message.disk != self._index:
                    continue
                if message.can_read:
                    found[message.name] = message
                elif not message.is_container and message.kind not in (b"", b"swap"):
                    where = place_of(self._name, message)
                    kind, why = os.fsdecode(message.kind), os.fsdecode(message.remark)
                    why = why or "its file system is not read here"
                    self._tell(f"{where} ({kind}) is not shown: {why}")
            self._volumes = found
        return list(self._volumes.values())

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
        self, action: str, volume: bytes = b"", path: bytes = b"/", offset: int = 0, length: int = 0
    ) -> list[FromParser]:
        """The whole answer. A parser that has ended, its time used up, is started again once."""
        was_there = self._session is not None
        try:
            if self._session is None:
                self._session = self._started()
            disk = self._index
            answer = self._session.ask(action, disk, volume, path, offset=offset, length=length)
            return list(self._looked_at(answer, path))
        except ParserError as error:
            self._end_session()
            if not was_there:
                raise self._fault(str(error)) from error
            return self._ask(action, volume, path, offset, length)
        except Cancelled as error:
            raise OSError(errno.EIO, str(error)) from error
        except Failure as error:
            self._end_session()
            raise self._fault(str(error)) from error

    def _started(self) -> FileSession:
        try:
            session = FileSession(self._disks, self._cancel, self._keys)
        except OSError as error:
            why = os_error_text(error)
            raise self._fault(f"{self._name}: cannot start the parser: {why}") from error
        try:
            return session.__enter__()
        except BaseException:
            session.__exit__()
            raise

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

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.__exit__()


def _is_name(name: bytes) -> bool:
    plain = name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name
    return plain and len(name) <= _MAX_NAME_BYTES

# SPDX-License-Identifier: Apache-2.0
"""The two engines that read file systems, and which of them reads what.

The parser starts within a tenth of a second and needs nothing of the host. The appliance needs
QEMU and a kernel, and some seconds; it reads what that kernel reads, logs replayed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.appliance import Appliance, check_host
from vmapipe.access.files.copies import shown
from vmapipe.access.files.messages import WRONG_KEY, EntryFailed, FromParser, Key, Volume
from vmapipe.access.files.session import FileSession
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError
from vmapipe.runtime.text import one_line

AUTO, PARSER, VM = ENGINES = ("auto", "parser", "vm")
# What neither of them reads, or nothing can be read of.
_NEITHER = frozenset({b"", b"swap", b"damaged", b"bitlocker", b"hfs+", b"ufs1", b"ufs2"})
_MISSING = """\
files are read with pytsk3: pip install 'vmapipe[files]'; without it, serve the disk \
(vmapipe serve) and open it with guestfish"""


class FileReader(Protocol):
    """An engine that is ready: it answers commands about all disks of an archive."""

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
        """The answers to one command."""

    def place_of(self, volume: Volume) -> str:
        """Its name as it stands in a place: DISK, DISK:PARTITION or DISK/GROUP/VOLUME."""


class _Candidates(NamedTuple):
    """Volumes that have the path, and those that are not looked into."""

    holding: list[Volume]
    unreadable: list[Volume]


class Engines:
    """The engines for one archive, started when they are needed. Use as a context."""

    def __init__(
        self,
        disks: Sequence[tuple[str, ArchiveDisk]],
        cancel: Cancel,
        keys: Sequence[Key],
        choice: str,
        appliance_folder: str | None,
        notice: Callable[[str], None],
    ) -> None:
        """`choice`: one of ENGINES; `appliance_folder`: see Appliance."""
        self._disks = disks
        self._cancel = cancel
        self._keys = keys
        self._choice = choice
        self._folder = appliance_folder
        self._notice = notice
        self._stack = contextlib.ExitStack()
        self._started: dict[str, FileReader] = {}
        self._obstacle: str | None = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def first(self) -> FileReader:
        """The engine that is asked first. Raises Failure."""
        if self._choice == VM:
            return self._appliance()
        if importlib.util.find_spec("pytsk3") is not None:
            return self._parser()
        if self._choice == PARSER:
            raise UsageError(_MISSING)
        if self.obstacle():
            raise UsageError(f"{_MISSING}; or --engine vm, but: {self.obstacle()}")
        return self._appliance()

    def obstacle(self) -> str:
        """Why the appliance cannot be had here; empty: it can, as far as is known."""
        if self._obstacle is None:
            try:
                check_host(self._folder)
                self._obstacle = ""
            except Failure as error:
                self._obstacle = str(error)
        return self._obstacle

    def may_read(self, volume: Volume) -> bool:
        """Whether the appliance is for this one, which the parser does not read, or not truly."""
        if self._choice != AUTO or volume.is_container:
            return False
        if volume.can_read:
            return bool(volume.remark)
        return not (
            volume.kind in _NEITHER
            or volume.kind.endswith((b", damaged", b"pool"))
            or volume.remark.startswith(WRONG_KEY)
        )

    def find(self, disk: int, where: bytes, path: bytes) -> tuple[FileReader, Volume]:
        """The volume that has the path, and the engine that reads it. Raises Failure, UsageError."""
        session = self.first()
        found = _look(session, disk, where, path)
        if len(found.holding) > 1:
            raise _several(session, found.holding, path)
        why = ""
        if any(map(self.may_read, found.holding or found.unreadable)):
            try:
                return self._find_in_appliance(disk, where, path, found)
            except Cancelled:
                raise
            except Failure as error:
                why = str(error)
        if found.holding:
            if why:
                self._notice(f"notice: the engine vm would replay its log, but: {why}")
            return session, found.holding[0]
        if not any(session.ask("volumes", disk, where)):
            raise UsageError(f"there is no such volume; there is {_all_places(session)}")
        raise self._not_found(session, found, path, why)

    def _find_in_appliance(
        self, disk: int, where: bytes, path: bytes, before: _Candidates
    ) -> tuple[FileReader, Volume]:
        """Raises Failure: why it does not have it."""
        if self.obstacle():
            raise Failure(self.obstacle())
        appliance = self._appliance()
        found = _look(appliance, disk, where, path)
        holding = found.holding
        if before.holding:
            wanted = before.holding[0]
            holding = [item for item in holding if item[:2] == wanted[:2]]
        if len(holding) > 1:
            raise _several(appliance, holding, path)
        if holding:
            return appliance, holding[0]
        remarks = [_text(appliance, item) for item in found.unreadable if item.remark]
        raise Failure("; ".join(remarks) or f"no file system there has {shown(path)}")

    def _not_found(self, session: FileReader, found: _Candidates, path: bytes, why: str) -> Failure:
        text = f"no file system here has {shown(path)}"
        left = [item for item in found.unreadable if item.kind not in (b"", b"swap")]
        if left:
            text += f"; not looked into: {', '.join(_text(session, item) for item in left)}"
        if why:
            text += f"; the engine vm is for that, but: {why}"
        elif any(not item.remark for item in left):
            text += ", which this command cannot read"
        else:
            return Failure(text)
        return Failure(f"{text}: serve the disk (vmapipe serve) and open it with guestfish")

    def _parser(self) -> FileReader:
        if PARSER not in self._started:
            session = FileSession(self._disks, self._cancel, self._keys)
            self._started[PARSER] = self._stack.enter_context(session)
        return self._started[PARSER]

    def _appliance(self) -> FileReader:
        if VM not in self._started:
            appliance = Appliance(self._disks, self._cancel, self._keys, self._folder, self._notice)
            self._started[VM] = self._stack.enter_context(appliance)
        return self._started[VM]


def _look(session: FileReader, disk: int, where: bytes, path: bytes) -> _Candidates:
    """Raises Failure."""
    found = _Candidates([], [])
    for message in session.ask("find", disk, where, path):
        match message:
            case Volume(can_read=True):
                found.holding.append(message)
            case Volume(is_container=False):
                found.unreadable.append(message)
            case EntryFailed(_, reason):
                raise Failure(os.fsdecode(reason))
    return found


def _several(session: FileReader, holding: Sequence[Volume], path: bytes) -> UsageError:
    choices = ", ".join(f"{session.place_of(volume)}:" for volume in holding)
    return UsageError(f"several file systems have {shown(path)}: say which of {choices}")


def _all_places(session: FileReader) -> str:
    volumes = [message for message in session.ask("volumes") if isinstance(message, Volume)]
    return ", ".join(f"{session.place_of(volume)}:" for volume in volumes)


def _text(session: FileReader, volume: Volume) -> str:
    """A volume that is not read, and why."""
    why = f", {os.fsdecode(volume.remark)}" if volume.remark else ""
    return one_line(f"{session.place_of(volume)}: ({os.fsdecode(volume.kind)}{why})")

# SPDX-License-Identifier: Apache-2.0
"""The two engines that read file systems, and which of them reads what.

The parser starts within a tenth of a second and needs nothing of the host. The appliance needs
QEMU and a kernel, and some seconds; it reads what that kernel reads, logs replayed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.appliance import Appliance, check_host
from vmapipe.access.files.copies import shown
from vmapipe.access.files.messages import WRONG_KEY, EntryFailed, Key, Volume
from vmapipe.access.files.session import FileReader, FileSession
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError
from vmapipe.runtime.text import one_line

AUTO, PARSER, VM = ENGINES = ("auto", "parser", "vm")
# What neither of them reads, or nothing can be read of.
_NEITHER = frozenset({b"", b"swap", b"damaged", b"bitlocker", b"hfs+", b"ufs1", b"ufs2"})
_MISSING = """\
files are read with pytsk3: pip install 'vmapipe[files]'; without it, serve the disk \
(vmapipe serve) and open it with guestfish"""


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
            self._obstacle = obstacle(self._folder)
        return self._obstacle

    def may_read(self, volume: Volume) -> bool:
        """Whether the appliance would be asked for this one."""
        return self._choice == AUTO and is_for_vm(volume)

    def find(self, disk: int, where: bytes, path: bytes) -> tuple[FileReader, Volume]:
        """The volume that has the path, and the engine that reads it. Raises Failure, UsageError."""
        reader = self.first()
        found = _look(reader, disk, where, path)
        why = ""
        if len(found.holding) < 2 and self._is_for_vm(reader, disk, where, found):
            try:
                reader, found = self._look_in_vm(disk, where, path, found)
            except Cancelled:
                raise
            except Failure as error:
                why = str(error)
        if len(found.holding) > 1:
            choices = ", ".join(f"{reader.place_of(volume)}:" for volume in found.holding)
            raise UsageError(f"several file systems have {shown(path)}: say which of {choices}")
        if found.holding:
            if why:
                self._notice(f"notice: the engine vm would replay its log, but: {why}")
            return reader, found.holding[0]
        if not why and not _volumes(reader, disk, where):
            there = ", ".join(f"{reader.place_of(volume)}:" for volume in _volumes(reader))
            raise UsageError(f"there is no such volume; there is {there}")
        raise self._not_found(reader, found, (disk, where, path), why)

    def _is_for_vm(self, reader: FileReader, disk: int, where: bytes, found: _Candidates) -> bool:
        """Whether the appliance may have the path, or has more than the parser shows of it."""
        if self._choice != AUTO or reader is self._started.get(VM):
            return False
        if found.holding:
            return any(map(is_for_vm, found.holding))
        # A log may hold the path; an encrypted volume, the volume that is meant.
        scope = _volumes(reader, disk, where) or _volumes(reader, disk) or _volumes(reader)
        return any(map(is_for_vm, scope))

    def _look_in_vm(
        self, disk: int, where: bytes, path: bytes, before: _Candidates
    ) -> tuple[FileReader, _Candidates]:
        """Raises Failure: why it cannot be had, or does not read what the parser does."""
        if self.obstacle():
            raise Failure(self.obstacle())
        appliance = self._appliance()
        found = _look(appliance, disk, where, path)
        if not before.holding:
            return appliance, found
        wanted = before.holding[0]
        holding = [item for item in found.holding if item[:2] == wanted[:2]]
        if not holding:
            remarks = [_text(appliance, item) for item in found.unreadable if item.remark]
            raise Failure("; ".join(remarks) or f"no file system there has {shown(path)}")
        return appliance, _Candidates(holding, [])

    def _not_found(
        self, reader: FileReader, found: _Candidates, place: tuple[int, bytes, bytes], why: str
    ) -> Failure:
        disk, where, path = place
        text = f"no file system here has {shown(path)}"
        left = [item for item in found.unreadable if item.kind not in (b"", b"swap")]
        if left:
            text += f"; not looked into: {', '.join(_text(reader, item) for item in left)}"
        if old := [item for item in _volumes(reader, disk, where) if item.can_read and item.remark]:
            text += f"; the log is not replayed of {', '.join(f'{reader.place_of(item)}:' for item in old)}"
        if why:
            text += f"; the engine vm is for that, but: {why}"
        elif any(not item.remark for item in left):
            text += ", which this command cannot read"
        else:
            return Failure(text)
        return Failure(f"{text}: serve the disk (vmapipe serve) and open it with guestfish")

    def _parser(self) -> FileReader:
        if PARSER not in self._started:
            parser = FileSession(self._disks, self._cancel, self._keys)
            self._started[PARSER] = self._stack.enter_context(parser)
        return self._started[PARSER]

    def _appliance(self) -> FileReader:
        if VM not in self._started:
            appliance = Appliance(self._disks, self._cancel, self._keys, self._folder, self._notice)
            self._started[VM] = self._stack.enter_context(appliance)
        return self._started[VM]


def obstacle(folder: str | None) -> str:
    """Why the appliance cannot be had here (`folder`: see Appliance); empty: it can, as far as is known."""
    try:
        check_host(folder)
    except Failure as error:
        return str(error)
    return ""


def is_for_vm(volume: Volume) -> bool:
    """Whether the appliance is for this one, which the parser does not read, or not truly."""
    if volume.is_container:
        return False
    if volume.can_read:
        return bool(volume.remark)
    return not (
        volume.kind in _NEITHER
        or volume.kind.endswith((b", damaged", b"pool"))
        or volume.remark.startswith(WRONG_KEY)
    )


def _look(reader: FileReader, disk: int, where: bytes, path: bytes) -> _Candidates:
    """Raises Failure."""
    found = _Candidates([], [])
    for message in reader.ask("find", disk, where, path):
        match message:
            case Volume(can_read=True):
                found.holding.append(message)
            case Volume(is_container=False):
                found.unreadable.append(message)
            case EntryFailed(_, reason):
                raise Failure(os.fsdecode(reason))
    return found


def _volumes(reader: FileReader, disk: int = -1, where: bytes = b"") -> list[Volume]:
    answer = reader.ask("volumes", disk, where)
    return [message for message in answer if isinstance(message, Volume)]


def _text(reader: FileReader, volume: Volume) -> str:
    """A volume that is not read, and why."""
    why = f", {os.fsdecode(volume.remark)}" if volume.remark else ""
    return one_line(f"{reader.place_of(volume)}: ({os.fsdecode(volume.kind)}{why})")

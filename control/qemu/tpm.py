# SPDX-License-Identifier: Apache-2.0
"""The state of a machine's TPM, which swtpm keeps: found, read whole, and backed up as one disk.

In an archive it is what swtpm itself reads as `--tpmstate backend-uri=file://…`, as the volumes of
Proxmox VE are. swtpm writes to it without telling anybody, so it is read again until nothing
changes, and once more when the disks' backup has begun.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmapipe.control.qemu.disks import TPM_NAME, MachineDisk
from vmapipe.control.qemu.jobs import run_prefix
from vmapipe.control.qemu.qemu_process import command_line, uid_of
from vmapipe.control.qemu.sink_folder import TPM_STATE_NAME, SinkFolder
from vmapipe.control.qmp.connection import Command, QmpLink, QmpRefused
from vmapipe.runtime.errors import Failure, os_error_text

#: As Proxmox VE's volumes are.
VOLUME_BYTES = 4 << 20
# swtpm's own layout: a header with a place for each of its states, then these.
_MAGIC = 0x737774706D6C696E
_VERSION = 1
_HEADER = struct.Struct("<QBxH")
_ENTRY = struct.Struct("<III")
_ENTRIES = 15
_HEADER_BYTES = _HEADER.size + _ENTRIES * _ENTRY.size
# A state may grow within its section before swtpm has to move the others.
_SECTION_BYTES = 1024
# In the order of their places.
_STATES = ("permall", "volatilestate", "savestate")
_STATE_FILE = re.compile(r"tpm2?-00\.(permall|volatilestate|savestate)")
# swtpm writes some KiB; two looks that see the same, so far apart, are at what it has finished.
_LOOK_S = 0.02
_LOOKS = 100


class TpmPlace(NamedTuple):
    """Where swtpm keeps a state, as we can reach it: a folder, or a volume."""

    path: str
    is_folder: bool


def find_tpm(qemu_words: Sequence[str]) -> TpmPlace:
    """Find the state of the swtpm that this QEMU, by its argv, is connected to. Raises Failure."""
    sockets = {
        word.removeprefix("path=")
        for words in qemu_words
        for word in words.split(",")
        if word.startswith("path=/")
    }
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if not _is_swtpm(pid):
            continue
        words = _options(command_line(pid))
        control = _fields(words.get("ctrl", "")).get("path", "")
        if control and _absolute(pid, control) in sockets:
            return _place(pid, words.get("tpmstate", ""))
    raise Failure("no swtpm was found that QEMU is connected to")


def _is_swtpm(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("swtpm")
    except OSError:
        return False


def _options(words: Sequence[str]) -> dict[str, str]:
    """`--ctrl X` and `--ctrl=X`."""
    found = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else after
    return found


def _fields(text: str) -> dict[str, str]:
    return {key: value for key, _, value in (part.partition("=") for part in text.split(","))}


def _absolute(pid: int, path: str) -> str:
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
    except OSError:
        return path


def _place(pid: int, words: str) -> TpmPlace:
    """Return where swtpm keeps the state. Raises Failure."""
    fields = _fields(words)
    uri = fields.get("backend-uri", "")
    folder = fields.get("dir") or (uri.removeprefix("dir://") if uri.startswith("dir:") else "")
    volume = uri.removeprefix("file://") if uri.startswith("file:") else ""
    if not folder and not volume:
        raise Failure(f"swtpm's own words do not say where it keeps the state: {words!r}")
    # By its own root: it may be in a namespace of its own.
    return TpmPlace(f"/proc/{pid}/root{_absolute(pid, folder or volume)}", bool(folder))


def read_volume(place: TpmPlace) -> bytes:
    """Return the state as a volume of VOLUME_BYTES. Raises Failure when it cannot be read whole."""
    before = read_now(place)
    for _ in range(_LOOKS):
        time.sleep(_LOOK_S)
        now = read_now(place)
        if now == before:
            check_volume(now)
            return now
        before = now
    raise Failure("swtpm writes to its state all the time")


def read_now(place: TpmPlace) -> bytes:
    """Return the state as it is now, maybe in the middle of a change. Raises Failure."""
    try:
        data = _read_folder(place.path) if place.is_folder else _read_file(place.path)
    except OSError as error:
        raise Failure(f"its state cannot be read: {os_error_text(error)}") from error
    return data.ljust(VOLUME_BYTES, b"\0")


def _read_folder(path: str) -> bytes:
    """Read a folder of states; swtpm replaces each file as a whole."""
    states = {}
    for name in sorted(os.listdir(path)):
        if match := _STATE_FILE.fullmatch(name):
            states[match[1]] = _read_file(os.path.join(path, name))
    return as_volume(states)


def _read_file(path: str) -> bytes:
    """Read a state; what follows a volume's first 4 MiB is not swtpm's."""
    with open(path, "rb") as file:
        return file.read(VOLUME_BYTES)


def as_volume(states: Mapping[str, bytes]) -> bytes:
    """The states of a folder, by name, as swtpm lays them out in one file. Raises Failure."""
    if "permall" not in states:
        raise Failure("swtpm has not kept any state yet")
    entries, sections, offset = b"", b"", _HEADER_BYTES
    for name in _STATES:
        data = states.get(name, b"")
        length = -(-len(data) // _SECTION_BYTES) * _SECTION_BYTES
        entries += _ENTRY.pack(offset if data else 0, len(data), length)
        sections += data.ljust(length, b"\0")
        offset += length
    header = _HEADER.pack(_MAGIC, _VERSION, _HEADER_BYTES) + entries.ljust(
        _ENTRIES * _ENTRY.size, b"\0"
    )
    if offset > VOLUME_BYTES:
        raise Failure(f"its state has more than the {VOLUME_BYTES >> 20} MiB of any TPM")
    return header + sections


def states_of(volume: bytes) -> dict[str, bytes]:
    """Return the states in a volume by name, as swtpm has them in a folder. Raises Failure."""
    check_volume(volume)
    found = {}
    for index, name in enumerate(_STATES):
        offset, length, _ = _ENTRY.unpack_from(volume, _HEADER.size + index * _ENTRY.size)
        if length:
            found[name] = volume[offset : offset + length]
    return found


def check_volume(data: bytes) -> None:
    """Refuse a volume that swtpm would not read. Raises Failure."""
    if len(data) < _HEADER_BYTES:
        raise Failure("swtpm has not kept any state yet")
    magic, version, header_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or header_bytes != _HEADER_BYTES:
        raise Failure("its state is not in the layout of swtpm's volumes")
    for index in range(_ENTRIES):
        offset, length, section = _ENTRY.unpack_from(data, _HEADER.size + index * _ENTRY.size)
        is_inside = offset >= _HEADER_BYTES and offset + length <= len(data) and length <= section
        if length and not is_inside:
            raise Failure("its state is not whole")


class TpmState:
    """The TPM's state as one of a backup's disks. Call `add`, begin the jobs, call `check`.

    All raise Failure.
    """

    def __init__(self, link: QmpLink, run: str, qemu_pid: int | None) -> None:
        """Find and read it. Raises Failure, with the reason."""
        if link.peer_pid is None:
            raise Failure("QEMU takes it only over a Unix socket")
        if not qemu_pid:
            raise Failure("its QEMU is not among the processes that we see")
        self._link = link
        self._qemu_pid = qemu_pid
        self._place = find_tpm(command_line(qemu_pid))
        self._content = read_volume(self._place)
        self._fdset = -1
        self._folder: SinkFolder | None = None
        self.disk = MachineDisk(TPM_NAME, f"{run_prefix(run)}tpm", VOLUME_BYTES)

    def add(self, folder: SinkFolder | None) -> Command:
        """Read the state, and return the command that makes it a node of QEMU.

        A descriptor belongs to a connection that stays: over one that is shared, QEMU opens a file in
        `folder` instead.
        """
        self._content = read_volume(self._place)
        if self._link.is_shared and folder is not None:
            self._folder = folder
            owner = uid_of(self._qemu_pid)
            path = folder.lend(
                TPM_STATE_NAME, self._content, os.geteuid() if owner is None else owner
            )
            return self._command(path)
        memory = os.memfd_create(TPM_NAME)
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(self._content)
            # QEMU wants a descriptor that cannot be written to for what it only reads.
            lent = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(memory)
        try:
            self._fdset = self._link.add_fd(lent)
        except QmpRefused as error:
            raise Failure(f"disk {TPM_NAME!r}: QEMU does not take it: {error}") from error
        finally:
            os.close(lent)
        return self._command(f"/dev/fdset/{self._fdset}")

    def _command(self, path: str) -> Command:
        file_node = {"driver": "file", "read-only": True, "locking": "off"}
        file_node["filename"] = path
        arguments = {"node-name": self.disk.device, "driver": "raw", "read-only": True}
        return Command("blockdev-add", {**arguments, "file": file_node})

    def check(self) -> None:
        """Check that the state is of the instant: unchanged until the jobs had begun."""
        # The node has it open; QEMU keeps it no longer than that.
        if self._folder is not None:
            self._folder.remove_names(TPM_STATE_NAME)
        else:
            with contextlib.suppress(QmpRefused):
                self._link.execute(Command("remove-fd", {"fdset-id": self._fdset}))
        if read_now(self._place) != self._content:
            raise Failure(
                f"disk {TPM_NAME!r}: the TPM changed its state in the moment of the instant: start "
                "the backup again"
            )

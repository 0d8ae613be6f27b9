# SPDX-License-Identifier: Apache-2.0
"""A domain that runs from its archive while its disks arrive: `vmapipe restore --libvirt --live`.

Beside the targets there is a folder NAME.live for as long as something is missing on them: overlays
with what the machine writes, the archive's server, and the notes by which a later process goes on.
The domain's definition names the overlay of a disk, or its target, and never a target that is not whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vmapipe.access.live.nodes import LiveDisk, export_uri, own_nodes_below, whole_sectors
from vmapipe.access.live.record import NOTE_NAME, LiveNote, NoteFile, read_members
from vmapipe.access.live.relocation import Relocation, done_event, explained
from vmapipe.access.live.server import ArchiveServer
from vmapipe.access.live.session import absolute_archive, tell_begin
from vmapipe.access.machine.domain import ArchiveBelow, DraftDisk, Placement
from vmapipe.access.machine.domain_xml import parse_xml
from vmapipe.access.overlay import archive_id
from vmapipe.control.hosts.libvirt.host_facts import QemuUser, paths_of
from vmapipe.control.hosts.libvirt.live_carrier import DomainCarrier
from vmapipe.control.hosts.libvirt.places import ChosenPlace
from vmapipe.control.hosts.libvirt.removal import Removal
from vmapipe.control.hosts.libvirt.undo import Made, MadeJournal
from vmapipe.control.qemu.qemu_process import pid_of_qemu
from vmapipe.control.qmp.answers import NAME, SIZE, TEXT, List, Record
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.targets.files import Folders
from vmapipe.restore.targets.image import new_overlay
from vmapipe.restore.targets.plan import device_named
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import MAX_SOCKET_PATH_BYTES, HeldFolder
from vmapipe.runtime.text import one_line

SUFFIX = ".live"
_SOCKET, _SERVER_LOG, _DOMAIN_NOTE = "archive.sock", "serve.log", "domain.json"
# Others have no error policy in QEMU (a floppy drive, an SD card), or none that libvirt sets.
_BUSES = ("virtio", "scsi", "sata", "ide")
# libvirt's QEMU has to enter it, and nobody else looks into it.
_FOLDER_MODE = 0o711
_VERSION = 1
_MADE = Record({"path": TEXT, "device": SIZE, "inode": SIZE, "pool": TEXT, "volume": TEXT})
_SHAPE = Record({"version": SIZE, "uuid": NAME, "old": List(_MADE)})


class LiveWords(NamedTuple):
    """What a user says of it. `serve_options`: of `vmapipe serve`; `again`: the command that goes on."""

    speed_bytes_s: int
    serve_options: Sequence[str]
    again: str


class _DomainNote(NamedTuple):
    """What the end needs: `drivers`, by a disk's name its options in the finished definition; `old`: what
    an overwritten domain had.
    """

    uuid: str
    drivers: Mapping[str, Mapping[str, str]]
    old: tuple[Made, ...]


def _is_live_disk(disk: DraftDisk) -> bool:
    """Tell whether a disk can arrive while the machine runs; others are restored before."""
    element = disk.element
    is_utf8 = disk.source == disk.source.encode(errors="replace").decode(errors="replace")
    return (
        bool(disk.source)
        and is_utf8
        and element.get("device", "disk") in ("disk", "lun")
        and element.find("target").get("bus") in _BUSES
        and not element.has("readonly")
    )


class NewLiveFolder:
    """A folder NAME.live on its way, with overlays; all that is made is in the journal."""

    def __init__(self, path: str, journal: MadeJournal, user: QemuUser | None) -> None:
        """Raises Failure, UsageError."""
        self.path, self._journal, self._user = path, journal, user
        self.socket = os.path.join(path, _SOCKET)
        self.disks: list[LiveDisk] = []
        #: By a disk's name where it is for now.
        self.placements: dict[str, Placement] = {}
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"{self.socket}: a socket's path has {MAX_SOCKET_PATH_BYTES} bytes at most: choose a "
                "folder with a shorter path, or a shorter --name"
            )
        try:
            with HeldFolder(os.path.dirname(path)) as above, self._made(above) as folder:
                os.fchmod(folder.fd, _FOLDER_MODE)
                status = os.fstat(folder.fd)
        except OSError as error:
            raise Failure(f"cannot make {path}: {os_error_text(error)}") from error
        journal.add(Made(path, status.st_dev, status.st_ino))

    def _made(self, above: HeldFolder) -> HeldFolder:
        """Make it, or take over one whose restore was killed when all was restored.

        Raises OSError, UsageError.
        """
        name = os.path.basename(self.path)
        try:
            return above.make_folder(name)
        except FileExistsError:
            pass
        with contextlib.suppress(OSError, Failure), _our_folder(self.path) as folder:
            if folder.names() == [_DOMAIN_NOTE]:
                os.unlink(_DOMAIN_NOTE, dir_fd=folder.fd)
            if not folder.names():
                return folder.duplicate()
        raise UsageError(
            f"{self.path} exists already: it is of a live restore whose domain is not there any more; "
            "remove it, or --name another"
        )

    def add_all(
        self,
        archive: Archive,
        disks: Sequence[DraftDisk],
        chosen: Mapping[str, ChosenPlace],
        notice: Callable[[str], None],
    ) -> None:
        """Make the overlays of the disks that can arrive later. Raises Failure, UsageError."""
        for disk in disks:
            if _is_live_disk(disk):
                self._add(archive, disk, chosen[disk.key])
            elif disk.source:
                notice(f"disk {disk.key} is restored before the machine starts")
        if not self.disks:
            raise UsageError(
                "none of the machine's disks can arrive while it runs (drives, read-only disks, USB): "
                "leave --live out"
            )

    def _add(self, archive: Archive, disk: DraftDisk, place: ChosenPlace) -> None:
        """Make a disk's overlay. Raises Failure."""
        device = device_named(archive.header, disk.source)
        path = os.path.join(self.path, f"{disk.key}.qcow2")
        with contextlib.ExitStack() as stack:
            folders = stack.enter_context(Folders(None))
            size_bytes = whole_sectors(device.size_bytes)
            backing = export_uri(self.socket, device.name)
            file = stack.enter_context(
                contextlib.closing(new_overlay(path, folders, size_bytes, backing))
            )
            status = os.fstat(file.fd)
            self._journal.add(Made(path, status.st_dev, status.st_ino))
            if self._user is not None:
                try:
                    os.fchown(file.fd, self._user.uid, self._user.gid)
                except OSError as error:
                    raise Failure(
                        f"{path} cannot be given to libvirt's QEMU (user {self._user.uid}: "
                        f"{os_error_text(error)}): use another folder"
                    ) from error
            file.publish()
        found = LiveDisk(
            device.dev_id,
            device.name,
            device.size_bytes,
            disk.key,
            (),
            path,
            place.placement.path,
            place.placement.image_format,
            False,
        )
        self.disks.append(found._replace(below=own_nodes_below(found.job)[:1]))
        below = ArchiveBelow(device.name, self.socket)
        self.placements[disk.key] = Placement("file", path, "qcow2", below)

    def write(
        self, name: str, archive: Archive, domain_uuid: str, finished: str, old: Sequence[Made]
    ) -> None:
        """Write the notes: from now on any process can go on. `finished`: the XML of the end."""
        drivers = {}
        names = {disk.node for disk in self.disks}
        for disk in parse_xml(finished.encode()).find("devices").all("disk"):
            if (key := disk.find("target").get("dev")) in names:
                drivers[key] = dict(disk.find("driver").attributes)
        members = {
            "version": _VERSION,
            "uuid": domain_uuid,
            "drivers": drivers,
            "old": [made._asdict() for made in old],
        }
        with _our_folder(self.path) as folder:
            try:
                fd = folder.open(_DOMAIN_NOTE, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                with open(fd, "wb") as file:
                    file.write(json.dumps(members).encode("utf-8", "surrogateescape"))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise Failure(f"cannot write in {self.path}: {os_error_text(error)}") from error
            with NoteFile(folder) as note_file:
                uuid = archive_id(archive.header).hex()
                place = absolute_archive(name)
                disks = tuple(self.disks)
                note_file.write(LiveNote(place, uuid, "", self.socket, True, disks, prepared=True))


def live_folder_of(name: str, domain_uuid: str, descriptions: Sequence[str]) -> str:
    """Return the folder of a domain that is being restored live; empty: it is not.

    `descriptions`: its XML, as it runs and as it is defined.
    """
    for path in sorted(frozenset[str]().union(*map(paths_of, descriptions))):
        place = os.path.dirname(path)
        folder = place if place.endswith(SUFFIX) else os.path.join(place, f"{name}{SUFFIX}")
        if os.path.exists(os.path.join(folder, NOTE_NAME)):
            with _our_folder(folder) as held:
                if _read_note(held).uuid == domain_uuid:
                    return folder
    return ""


def _our_folder(path: str) -> HeldFolder:
    """Open it, if nobody else can have written what is in it: a pool may be another user's.

    Raises Failure.
    """
    try:
        folder = HeldFolder(path)
    except OSError as error:
        raise Failure(f"cannot open {path}: {os_error_text(error)}") from error
    status = os.fstat(folder.fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & ~_FOLDER_MODE:
        folder.close()
        raise Failure(f"{path} belongs to another user, or others can write there: it is not used")
    return folder


def _read_note(folder: HeldFolder) -> _DomainNote:
    """Raises Failure."""
    path = os.path.join(folder.path, _DOMAIN_NOTE)
    try:
        found = read_members(folder, _DOMAIN_NOTE, _SHAPE, _VERSION)
    except FileNotFoundError as error:
        raise Failure(f"cannot read {path}: {error}") from error
    drivers = found.get("drivers")
    if not isinstance(drivers, dict) or not all(
        isinstance(one, dict) and all(isinstance(value, str) for value in one.values())
        for one in drivers.values()
    ):
        raise Failure(f"{path} is not a note of a live restore: it has no drivers")
    old = tuple(Made(**{key: one[key] for key in Made._fields}) for one in found["old"])
    return _DomainNote(found["uuid"], drivers, old)


class LiveDomain:
    """One process's part of a live restore. A context manager; its end leaves the machine running."""

    def __init__(
        self,
        uri: str,
        path: str,
        words: LiveWords,
        user: QemuUser | None,
        emit: Emit,
        cancel: Cancel,
    ) -> None:
        """`user`: libvirt's QEMU's, where it is another one. Raises Failure."""
        self._uri, self._words, self._emit, self._cancel = uri, words, emit, cancel
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(_our_folder(path))
            self._note_file = stack.enter_context(NoteFile(self._folder))
            note = self._note_file.read()
            if note is None:
                raise Failure(
                    f"{self._note_file.path} has gone: another process has ended the restore"
                )
            self._note = note
            self._domain_note = _read_note(self._folder)
            self._carrier = stack.enter_context(
                DomainCarrier(uri, self._domain_note.uuid, note.disks, cancel)
            )
            log = os.path.join(path, _SERVER_LOG)
            options = [*words.serve_options, note.archive]
            owner = (user.uid, user.gid) if user is not None else None
            self._server = stack.enter_context(
                ArchiveServer(note.socket, options, log, self._notice, owner)
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> LiveDomain:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start the machine: it stands still until it is on an export that waits for its server.

        Raises Failure; then it does not run, and no server is left.
        """
        # Whoever finds it standing still after our end lets it go on.
        self._write(self._note._replace(noted=self._note.noted._replace(held=True)))
        self._server.machine_pid = os.getpid()
        try:
            self._server.start(self._cancel)
            self._served(lambda: self._carrier.start(paused=True))
            self._stand()
            # Only now it is known with which process the server has to end.
            self._server.stop()
            self._serve()
        except BaseException:
            try:
                self._carrier.destroy_paused()
            finally:
                self._server.stop()
            raise
        self._notice(f"the domain {self._carrier.name} is started")

    def _serve(self) -> None:
        self._server.machine_pid = pid_of_qemu(None, self._domain_note.uuid)
        self._server.start(self._cancel)

    def _stand(self) -> None:
        note = self._note
        self._served(lambda: self._carrier.stand_on(note.socket, note.noted.moved))

    def _served(self, job: Callable[[], None]) -> None:
        """Do what needs the archive's server, again where that has ended meanwhile. Raises Failure."""
        while True:
            try:
                job()
                return
            except Failure:
                if not self._server.tend(self._cancel):
                    raise

    def go_on(self, archive: Archive) -> None:
        """Go on where a process before us has ended, or the machine. Raises Failure."""
        note, path = self._note, self._note_file.path
        if note.uuid != archive_id(archive.header).hex():
            raise UsageError(
                f"{path}: another archive is being restored to {self._carrier.name}, {note.archive}"
            )
        is_whole = all(disk.job in note.noted.moved for disk in note.disks)
        try:
            if self._carrier.is_active:
                self._notice(f"the domain {self._carrier.name} is running: its restore goes on")
                if not is_whole:
                    self._serve()
                    self._stand()
            elif is_whole:
                self._carrier.start(paused=False)
            else:
                self.start()
        except UsageError:
            raise
        except Failure as error:
            raise explained(error, self._words.again, self._words.again, self._notice) from error

    def run(self, archive: Archive) -> None:
        """Bring the disks to their targets. Raises Failure with what has become of the machine."""
        began = time.monotonic()
        note = self._note
        paths = {disk.dev_id: disk.path for disk in note.disks}
        tell_begin(archive, note.archive, paths, self._emit, self._cancel)
        try:
            Relocation(
                self._carrier,
                self._server,
                note,
                self._note_file,
                self._emit,
                self._cancel,
                self._words.speed_bytes_s,
            ).run()
            self._finish()
        except UsageError:
            raise
        except Failure as error:
            raise explained(error, self._words.again, self._words.again, self._notice) from error
        self._emit(done_event(note, began, self._words.speed_bytes_s))

    def _finish(self) -> None:
        """All disks are on their targets: what was needed for that goes."""
        self._server.stop()
        self._carrier.restore_drivers(self._domain_note.drivers)
        removal = Removal(self._carrier.host, self._uri, self._notice)
        for one in removal.remove(self._domain_note.old):
            self._notice(f"removed {one.path}, which the domain had before")
        for disk in self._note.disks:
            self._remove(os.path.basename(disk.overlay))
        for name in (_SERVER_LOG, _SOCKET):
            self._remove(name)
        self._note_file.remove()
        self._remove(_DOMAIN_NOTE)
        with self._folder.duplicate() as folder:
            # The lock goes with the last that was held.
            self._stack.close()
            place, name = os.path.split(folder.path)
            with contextlib.suppress(OSError), HeldFolder(place) as above:
                above.remove_folder(name, folder)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder.fd)

    def _write(self, note: LiveNote) -> None:
        self._note = note
        self._note_file.write(note)

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": one_line(text)})

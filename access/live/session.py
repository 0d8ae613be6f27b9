# SPDX-License-Identifier: Apache-2.0
"""A live restore from its first command to its end, begun or gone on with.

It is begun once: overlays, targets and the note are made, the server and the machine started. All
that follows can be done by any later process that finds the note.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmapipe.access.live.carrier import MonitorCarrier
from vmapipe.access.live.nodes import (
    LiveDisk,
    OverlaySource,
    export_uri,
    find_sources,
    machine_command,
    match_sources,
    node_names,
    own_nodes_below,
    whole_sectors,
)
from vmapipe.access.live.qemu import QemuProcess, check_policies, connect_if_alive, read_graph
from vmapipe.access.live.record import NOTE_NAME, LiveNote, NoteFile
from vmapipe.access.live.relocation import Relocation, done_event, explained
from vmapipe.access.live.server import ArchiveServer
from vmapipe.access.overlay import archive_id
from vmapipe.control.qemu.qemu_process import command_line
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import QmpLink
from vmapipe.restore.archive.manifest import manifest_beside
from vmapipe.restore.archive.reader import Archive
from vmapipe.restore.targets.files import Folders, NewFile
from vmapipe.restore.targets.image import new_overlay
from vmapipe.restore.targets.plan import Kind, Plan, TargetDefaults, disk_path, plan_folder
from vmapipe.restore.targets.targets import OpenTargets
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import MAX_SOCKET_PATH_BYTES, HeldFolder
from vmapipe.runtime.object_names import is_object
from vmapipe.runtime.text import name_text
from vmapipe.vma.header import Device, Header

_SERVER_SOCKET, _MONITOR = "archive.sock", "qmp.sock"
_SERVER_LOG, _MACHINE_LOG = "serve.log", "qemu.log"


class LiveRequest(NamedTuple):
    """What a user asks for. `machine`: the command behind `--`; `qmp`: the monitor of a machine.

    `chosen`, `configs`, `wishes`: as of `plan_folder`. `serve_options`: of `vmapipe serve`. `again`,
    `start_again`: the commands that go on, while the machine runs and when it has ended.
    """

    archive: str
    folder: str
    chosen: Sequence[tuple[str, str | None]]
    wishes: TargetDefaults
    configs: bool
    machine: Sequence[str]
    qmp: str
    qmp_share: bool
    speed_bytes_s: int
    serve_options: Sequence[str]
    again: str
    start_again: str


class LiveSession:
    """One process's part of a live restore. A context manager; its end leaves the machine running."""

    def __init__(
        self,
        request: LiveRequest,
        archive: Archive,
        folder: HeldFolder,
        folders: Folders,
        emit: Emit,
        cancel: Cancel,
    ) -> None:
        self._request = request
        self._archive = archive
        self._folder = folder
        self._folders = folders
        self._emit = emit
        self._cancel = cancel
        self._stack = contextlib.ExitStack()
        self._note_file = self._stack.enter_context(NoteFile(folder))
        self._pid: int | None = None

    def __enter__(self) -> LiveSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Restore all disks. Raises Failure with what has become of the machine, and the way on."""
        began = time.monotonic()
        request = self._request
        note = self._note_file.read()
        plan = self._plan(self._archive.header)
        if note is None:
            if not request.machine and not request.qmp:
                raise UsageError(
                    "say which machine: its command behind --, or --qmp with the monitor of one that "
                    "runs on overlays"
                )
            if request.machine and request.qmp:
                raise UsageError("--qmp is for a machine that runs: leave out what is behind --")
        else:
            self._check_same(note, plan)
        paths = {dev_id: spec.path for dev_id, spec in plan.targets.items()}
        tell_begin(self._archive, request.archive, paths, self._emit, self._cancel)
        has_begun = note is not None
        try:
            qmp, note, server = self._machine(note, plan)
            has_begun = True
            self._prepare(note, plan)
            note = self._note_file.read() or note
            Relocation(
                MonitorCarrier(qmp),
                server,
                note,
                self._note_file,
                self._emit,
                self._cancel,
                request.speed_bytes_s,
            ).run()
        except UsageError:
            raise
        except Failure as error:
            if not has_begun:
                raise
            raise explained(error, request.again, request.start_again, self._notice) from error
        self._finish(note, server)
        self._emit(done_event(note, began, request.speed_bytes_s))

    # --- What is asked for ---

    def _plan(self, header: Header) -> Plan:
        """Raises UsageError, HeaderError."""
        request = self._request
        chosen = list(request.chosen)
        for name, _ in chosen:
            if any(device.name == name and device.is_vmstate for device in header.devices):
                raise UsageError(
                    "the machine's memory cannot be restored live: the machine boots from its disks"
                )
        if not chosen:
            chosen = [(device.name, None) for device in header.devices if not device.is_vmstate]
        if not chosen:
            raise Failure("there is no disk in the archive: only configurations, or memory")
        return plan_folder(
            header, request.folder, chosen, configs=request.configs, wishes=request.wishes
        )

    def _check_same(self, note: LiveNote, plan: Plan) -> None:
        """Raises UsageError where the note belongs to something else."""
        path = os.path.join(self._request.folder, NOTE_NAME)
        if note.uuid != archive_id(self._archive.header).hex():
            raise UsageError(
                f"{path}: another archive is being restored there, {note.archive}: use another folder"
            )
        if not self._request.chosen and not self._request.wishes.image_format:
            return
        known = {disk.dev_id: (disk.path, disk.image_format) for disk in note.disks}
        wanted = {
            dev_id: (os.path.abspath(spec.path), spec.image_format or "raw")
            for dev_id, spec in plan.targets.items()
        }
        if known != wanted:
            raise UsageError(
                f"{path}: this restore was begun with other targets: say the same --device and "
                "--format, or none"
            )

    # --- The machine ---

    def _machine(
        self, note: LiveNote | None, plan: Plan
    ) -> tuple[QmpLink, LiveNote, ArchiveServer]:
        """The machine's monitor, the note, and the archive's server, all there."""
        request = self._request
        if note is None and request.qmp:
            return self._attach(plan)
        if note is None:
            return self._begin(plan)
        if not note.owned or request.qmp:
            qmp = open_link(request.qmp or note.qmp, share=request.qmp_share)
            self._stack.callback(qmp.close)
            note = self._renewed(note, qmp)
        else:
            alive = connect_if_alive(note.qmp)
            if alive is None:
                return self._start_again(note, plan)
            qmp = alive
            self._stack.callback(qmp.close)
            if request.machine:
                self._notice("the machine is running already: its restore goes on")
        self._pid = _living(qmp.peer_pid)
        server = self._server(note.socket)
        self._serve(server)
        return qmp, note, server

    def _begin(self, plan: Plan) -> tuple[QmpLink, LiveNote, ArchiveServer]:
        """Make overlays and a note, and start the machine. Nothing is left where that fails."""
        disks = self._own_disks(plan)
        note = LiveNote(
            absolute_archive(self._request.archive),
            archive_id(self._archive.header).hex(),
            self._own(_MONITOR),
            self._own(_SERVER_SOCKET),
            True,
            disks,
        )
        for path in (note.qmp, note.socket):
            if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
                raise UsageError(
                    f"{path}: a socket's path has {MAX_SOCKET_PATH_BYTES} bytes at most: choose a "
                    "folder with a shorter path"
                )
        # Refused now rather than when the machine runs.
        with (
            OpenTargets(self._archive, plan, self._folders),
            contextlib.ExitStack() as undo,
        ):
            machine_command(self._request.machine, disks, (), note.socket, note.qmp)
            for disk in disks:
                overlay = self._new_overlay(disk, note.socket)
                undo.callback(overlay.close)
                overlay.publish()
                undo.callback(overlay.withdraw)
            for name in (_SERVER_LOG, _SERVER_SOCKET, _MACHINE_LOG, _MONITOR):
                undo.callback(self._remove, name)
            self._note_file.write(note)
            undo.callback(self._note_file.remove)
            found = self._start(note)
            undo.pop_all()
        return found

    def _new_overlay(self, disk: LiveDisk, socket: str) -> NewFile:
        backing = export_uri(socket, disk.name)
        return new_overlay(disk.overlay, self._folders, whole_sectors(disk.size_bytes), backing)

    def _start(self, note: LiveNote) -> tuple[QmpLink, LiveNote, ArchiveServer]:
        command = machine_command(
            self._request.machine, note.disks, note.noted.moved, note.socket, note.qmp
        )
        server = self._server(note.socket)
        with (
            contextlib.ExitStack() as undo,  # after the machine's end: who serves it waits for clients
            QemuProcess(command, self._own(_MACHINE_LOG)) as process,
        ):
            self._pid = process.pid
            undo.callback(server.stop)
            self._serve(server)
            qmp = process.connect(note.qmp, self._cancel)
            self._stack.callback(qmp.close)
            check_policies(qmp, [disk.node for disk in note.disks])
            process.leave()
            undo.pop_all()
        # A program around QEMU (sudo, taskset) may have been the one that was started.
        self._pid = server.machine_pid = _living(qmp.peer_pid) or self._pid
        self._notice(f"the machine is started (process {self._pid}); its monitor is {note.qmp}")
        used = read_graph(qmp).in_use()
        for disk in note.disks:
            if disk.node not in used:
                self._notice(
                    f"no device of the machine stands on {name_text(disk.node)}: it is restored all "
                    f"the same (-device …,drive={name_text(disk.node)})"
                )
        return qmp, note, server

    def _start_again(self, note: LiveNote, plan: Plan) -> tuple[QmpLink, LiveNote, ArchiveServer]:
        """The machine has ended, or its host: its overlays and targets have all that it wrote."""
        if not self._request.machine:
            raise UsageError(
                "the machine does not run: say its command, too, and it goes on where it was: "
                f"{self._request.again} -- qemu-system-x86_64 …"
            )
        moved = note.noted.moved
        # What has arrived begins on its target; there is nothing to remove.
        disks = tuple(d._replace(below=()) if d.job in moved else d for d in note.disks)
        note = note._replace(disks=disks, noted=note.noted._replace(held=False))
        self._note_file.write(note)
        return self._start(note)

    def _attach(self, plan: Plan) -> tuple[QmpLink, LiveNote, ArchiveServer]:
        """A machine that its user has started on overlays above `vmapipe serve`."""
        request = self._request
        qmp = open_link(request.qmp, share=request.qmp_share)
        self._stack.callback(qmp.close)
        self._pid = _living(qmp.peer_pid)
        graph = read_graph(qmp)
        found = dict(match_sources(find_sources(graph), graph, self._devices(plan)))
        disks = [self._disk(device, plan, source) for device, source in found.items()]
        sockets = sorted({source.socket for source in found.values()})
        if len(sockets) > 1:
            raise UsageError(
                "the machine's disks are served by several servers (" + ", ".join(sockets) + "): "
                "choose one's with --device"
            )
        check_policies(qmp, [disk.node for disk in disks])
        self._warn_of_reconnect(qmp)
        note = LiveNote(
            absolute_archive(request.archive),
            archive_id(self._archive.header).hex(),
            request.qmp,
            sockets[0],
            False,
            tuple(disks),
        )
        server = self._server(note.socket)
        self._serve(server)
        return qmp, note, server

    def _renewed(self, note: LiveNote, qmp: QmpLink) -> LiveNote:
        """The machine may have been started again by its user, with other names of nodes."""
        graph = read_graph(qmp)
        sources = find_sources(graph)
        disks = []
        for disk in note.disks:
            if disk.job in note.noted.moved or graph.node(disk.node):
                disks.append(disk)
                continue
            device = Device(disk.dev_id, disk.name, disk.size_bytes)
            ((_, source),) = match_sources(sources, graph, [device])
            disks.append(disk._replace(node=source.node, below=source.below))
        return note._replace(disks=tuple(disks))

    def _warn_of_reconnect(self, qmp: QmpLink) -> None:
        """Tell where QEMU would not connect again, as far as that can be seen."""
        words = command_line(self._pid) if self._pid else []
        if words and not any("reconnect-delay" in word for word in words):
            self._notice(
                "the machine's command line has no reconnect-delay: should the archive's server end, "
                "the machine stands still until it is started again on its overlays"
            )

    # --- The archive's server ---

    def _server(self, socket: str) -> ArchiveServer:
        words = [*self._request.serve_options, absolute_archive(self._request.archive)]
        server = ArchiveServer(socket, words, self._own(_SERVER_LOG), self._notice)
        return self._stack.enter_context(server)

    def _serve(self, server: ArchiveServer) -> None:
        server.machine_pid = self._pid
        server.start(self._cancel)

    # --- Targets ---

    def _prepare(self, note: LiveNote, plan: Plan) -> None:
        """Make the targets, unless they are there."""
        if not note.prepared:
            with OpenTargets(self._archive, plan, self._folders) as targets:
                targets.publish()
            note = note._replace(prepared=True)
        self._note_file.write(note)

    def _devices(self, plan: Plan) -> list[Device]:
        return [d for d in self._archive.header.devices if d.dev_id in plan.targets]

    def _own_disks(self, plan: Plan) -> tuple[LiveDisk, ...]:
        devices = self._devices(plan)
        names = node_names(devices)
        disks = []
        for device in devices:
            name = names[device.dev_id]
            if name != device.name:
                self._notice(f"device {name_text(device.name)} is called {name} in QEMU")
            job = self._disk(device, plan, OverlaySource(name, (), "", "")).job
            below = (name, *reversed(own_nodes_below(job)))
            disk = self._disk(device, plan, OverlaySource(name, below, "", ""))
            overlay = disk_path(os.path.abspath(self._request.folder), device, "overlay.qcow2")
            disks.append(disk._replace(overlay=overlay))
        return tuple(disks)

    def _disk(self, device: Device, plan: Plan, source: OverlaySource) -> LiveDisk:
        spec = plan.targets[device.dev_id]
        path = os.path.abspath(spec.path)
        is_existing = spec.kind is Kind.EXISTING
        is_block = is_existing and stat.S_ISBLK(os.stat(path).st_mode)
        limit = whole_sectors(device.size_bytes) if is_existing else 0
        return LiveDisk(
            device.dev_id,
            device.name,
            device.size_bytes,
            source.node,
            source.below,
            "",
            path,
            spec.image_format or "raw",
            is_block,
            limit,
        )

    # --- Ends ---

    def _finish(self, note: LiveNote, server: ArchiveServer) -> None:
        """All disks are on their targets: what was needed for that goes."""
        if note.owned or server.is_ours:
            server.stop()
            self._remove(_SERVER_LOG)
        for disk in note.disks:
            if disk.overlay:
                self._remove(os.path.basename(disk.overlay))
        self._note_file.remove()

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    def _own(self, name: str) -> str:
        return os.path.join(os.path.abspath(self._request.folder), name)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder.fd)


def tell_begin(
    archive: Archive, name: str, paths: Mapping[int, str], emit: Emit, cancel: Cancel
) -> None:
    """Tell what is restored, and where to. `paths`: by dev_id."""
    header = archive.header
    emit(
        {
            "event": "restoring",
            "archive": name,
            "uuid": header.uuid.hex(),
            "devices": [
                {"name": device.name, "bytes": device.size_bytes, "path": paths[device.dev_id]}
                for device in header.devices
                if device.dev_id in paths
            ],
            "digests_checked": manifest_beside(name, cancel) is not None,
        }
    )
    if any(device.is_vmstate for device in header.devices):
        text = "the machine's memory in the archive is not used: the machine boots from its disks"
        emit({"event": "notice", "text": text})


def absolute_archive(archive: str) -> str:
    """The archive as a process in another folder has to name it."""
    return archive if is_object(archive) else os.path.abspath(archive)


def _living(pid: int | None) -> int | None:
    """A process that can be waited for; None: it is in another pid namespace, or on another host."""
    return pid if pid and os.path.exists(f"/proc/{pid}") else None

# SPDX-License-Identifier: Apache-2.0
"""The restore test of one open archive, from its configuration to the result."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.access.archive import OpenArchive
from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.drill.judge import Decision
from vmapipe.access.drill.plan import DrillPlan, default_plan
from vmapipe.access.drill.result import PICTURE, DrillResult
from vmapipe.access.drill.screen import encode_png
from vmapipe.access.drill.watch import Bounds, Console, Seen, Watch
from vmapipe.access.machine.accelerator import KVM, TCG, accelerator
from vmapipe.access.machine.argv import DISK_NODE, Forward, Wiring, qemu_words
from vmapipe.access.machine.firmware import STATE_BYTES, Firmware, Tpm, find_firmware
from vmapipe.access.machine.process import MachineEnded, OwnQemu, find_qemu
from vmapipe.access.machine.spec import MachineSpec, Omission, known_type
from vmapipe.access.overlay import OverlayDisk, archive_id
from vmapipe.access.serve import writable_offer
from vmapipe.clusters.sizes import CLUSTER_BYTES, MAX_DEVICE_BYTES
from vmapipe.control.qmp.connection import Command, QmpGone
from vmapipe.producer.nbd.server import DRAIN_S, Server, answer_promptly
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line
from vmapipe.vma.header import Device

#: A real Debian is up within half a minute under emulation, on a busy host within some.
KVM_LIMIT_S, TCG_LIMIT_S = 120.0, 600.0
_NAME = "the machine of the test"
# QEMU connects to our sockets before it answers on its monitor.
_CONNECT_S = 10.0
_HELP_S = 30.0
# Reading a machine's memory; the limit for a boot does not count it.
_RESUME_S = 600.0
_READ_BYTES = 1 << 20
_ANYTHING = re.compile(r"\S[^\n]*")


class DrillOptions(NamedTuple):
    """`limit_s`: 0: the accelerator's usual; `plan`: None: what the configuration lets expect."""

    plan: DrillPlan | None
    limit_s: float
    scratch_bytes: int
    resume: bool = True


class Outcome(NamedTuple):
    """The result, and files to keep by their names in the evidence's folder."""

    result: DrillResult
    files: Mapping[str, bytes]


def drill(
    archive: OpenArchive,
    spec: MachineSpec,
    options: DrillOptions,
    scratch: OwnFolder,
    cancel: Cancel,
    emit: Emit,
) -> Outcome:
    """Boot the machine and return what came of it. Raises Failure, Cancelled. Call it in the main thread."""
    return _Drill(archive, spec, options, scratch, cancel, emit).run()


class _Drill:
    def __init__(
        self,
        archive: OpenArchive,
        spec: MachineSpec,
        options: DrillOptions,
        scratch: OwnFolder,
        cancel: Cancel,
        emit: Emit,
    ) -> None:
        self._archive = archive
        self._spec = spec
        self._options = options
        self._scratch = scratch
        self._cancel = cancel
        self._emit = emit
        self._omissions = list(spec.omissions)
        self._accelerator = TCG
        self._firmware: Firmware | None = None
        self._words: Sequence[str] = ()
        self._memory = next((d for d in archive.header.devices if d.is_vmstate), None)

    def run(self) -> Outcome:
        self._accelerator = accelerator(self._cancel) if self._spec.can_use_kvm else TCG
        type_, note = known_type(self._spec.type, _machine_types())
        self._leave_out("machine", note)
        if self._spec.firmware.kind == "uefi":
            wanted = self._spec.firmware
            self._firmware = find_firmware(wanted, is_q35=self._spec.is_q35)
            self._leave_out("efidisk0", self._firmware.omission)
            self._make_variables(self._firmware)
        is_resumed = self._memory is not None and self._options.resume
        capped = {o.key for o in self._omissions} & {"memory", "cpus"}
        if is_resumed and capped:
            self._leave_out(
                "vmstate", f"the machine has less {' and '.join(sorted(capped))} here: it is booted"
            )
            is_resumed = False
        while True:
            try:
                return self._try(type_, is_resumed=is_resumed)
            except _CannotResume as error:
                self._leave_out(
                    "vmstate", f"it cannot go on from its memory here, so it is booted: {error}"
                )
                is_resumed = False
            except MachineEnded as error:
                if not _has_places(self._spec):
                    raise
                # Two devices in one place, or a bus that this QEMU has not.
                self._leave_out("PCI addresses", f"QEMU does not take them: {error}")
                self._spec = self._spec.without_places()

    def _leave_out(self, key: str, reason: str) -> None:
        if reason:
            self._omissions.append(Omission(key, one_line(reason, 300)))

    def _path(self, name: str) -> str:
        return os.path.join(self._scratch.path, name)

    # --- What the machine is given ---

    def _make_variables(self, firmware: Firmware) -> None:
        device = self._spec.firmware.variables
        fits = not firmware.omission or "small" not in firmware.omission
        target = self._path("variables.fd")
        if device and fits:
            if copy_start(self._archive, device, firmware.variables_bytes, target):
                return
            self._leave_out(
                "efidisk0", "it is too small for this firmware, which has new variables"
            )
        shutil.copyfile(firmware.variables, target)

    @contextlib.contextmanager
    def _tpm(self) -> Iterator[str]:
        """Yield the socket of its TPM; empty: it has none."""
        if self._spec.tpm is None:
            yield ""
            return
        state, address = self._path("tpm.state"), self._path("tpm.sock")
        for path in (state, address):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        try:
            name = self._spec.tpm.state
            if not name or not copy_start(self._archive, name, STATE_BYTES, state):
                with open(state, "wb") as file:
                    file.truncate(STATE_BYTES)
            tpm = Tpm(self._spec.tpm, state, address, self._cancel)
        except Failure as error:
            self._cancel.check()
            self._leave_out("tpm", str(error))
            yield ""
            return
        try:
            yield address
        finally:
            tpm.close()

    def _listener(self, stack: contextlib.ExitStack, name: str) -> tuple[socket.socket, str]:
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(8)
        return listener, path

    # --- One attempt ---

    def _try(self, type_: str, *, is_resumed: bool) -> Outcome:
        spec = self._spec
        with contextlib.ExitStack() as stack:
            serial, serial_path = self._listener(stack, "serial")
            log, log_path = self._listener(stack, "fwlog")
            listener, disks_path = self._listener(stack, "nbd")
            sources = [disk.source for disk in spec.disks]
            disks = DrillDisks(self._archive, sources, listener, self._scratch.path)
            stack.callback(disks.close)
            plan = self._plan(is_resumed=is_resumed)
            tcp = {s.port: s.address for s in plan.steps if s.kind == "tcp"}
            forwards = [Forward(0, port, address) for port, address in tcp.items()]
            if forwards and not spec.nics:
                self._leave_out("tcp", "the machine has no network card: no port of it can answer")
            wiring = Wiring(
                type=type_,
                accelerator=self._accelerator,
                disks_socket=disks_path,
                serial_socket=serial_path,
                firmware_log_socket=log_path,
                agent_socket=self._path("agent"),
                firmware_code=self._firmware.code if self._firmware else "",
                firmware_variables=self._path("variables.fd") if self._firmware else "",
                is_secure=bool(self._firmware and self._firmware.is_secure),
                tpm_socket=stack.enter_context(self._tpm()),
                incoming_socket=self._path("memory") if is_resumed else "",
                forwards=tuple(forwards) if spec.nics else (),
            )
            self._words = qemu_words(spec, wiring)
            machine = stack.enter_context(OwnQemu(_NAME, self._scratch, self._words, self._cancel))
            consoles = (_accepted(serial), _accepted(log))
            limit_s = self._limit_s(plan)
            bounds = Bounds(limit_s, self._options.scratch_bytes)
            watch = Watch(machine, consoles, plan, bounds, self._scratch.path)
            stack.callback(watch.close)
            watch.damage = self._archive.damage
            if is_resumed:
                self._load_memory(machine)
            self._emit(
                {
                    "event": "drilling",
                    "archive": self._archive.name,
                    "accelerator": self._accelerator,
                    "firmware": spec.firmware.kind,
                    "resumed": is_resumed,
                    "limit_s": limit_s,
                    "left_out": [{"key": o.key, "reason": o.reason} for o in self._omissions],
                }
            )
            self._start_probes(watch, plan, machine, wiring)
            seen = watch.run(self._cancel, lambda: disks.written_bytes, is_resumed=is_resumed)
            return self._outcome(seen, watch, machine, consoles, is_resumed=is_resumed)

    def _limit_s(self, plan: DrillPlan) -> float:
        usual = KVM_LIMIT_S if self._accelerator == KVM else TCG_LIMIT_S
        return self._options.limit_s or plan.timeout_s or usual

    def _plan(self, *, is_resumed: bool) -> DrillPlan:
        if self._options.plan is not None:
            return self._options.plan
        plan = default_plan(agent_expected=self._spec.agent_expected)
        if not is_resumed:
            return plan
        # What is in the middle of its work says anything, and no login prompt.
        steps = [s._replace(pattern=_ANYTHING) if s.kind == "serial" else s for s in plan.steps]
        return plan._replace(steps=tuple(steps))

    def _start_probes(
        self, watch: Watch, plan: DrillPlan, machine: OwnQemu, wiring: Wiring
    ) -> None:
        steps = list(enumerate(plan.steps))
        agent = [(i, step) for i, step in steps if step.kind in ("agent", "command")]
        if agent:
            watch.probes.ask_agent(wiring.agent_socket, agent)
        tcp = [(i, step) for i, step in steps if step.kind == "tcp"]
        if not wiring.forwards:
            return
        words = {"command-line": "info usernet"}
        said = ""
        with contextlib.suppress(QmpGone):  # its end is seen by its process
            said = str(machine.qmp.execute(Command("human-monitor-command", words)))
        ports = _forwarded(said)
        for index, step in tcp:
            if step.port in ports:
                watch.probes.ask_tcp(ports[step.port], index, step)

    # --- Memory ---

    def _load_memory(self, machine: OwnQemu) -> None:
        """Let QEMU read the machine's memory. Raises _CannotResume, Cancelled."""
        if self._memory is None:
            return
        device = self._memory._replace(size_bytes=MAX_DEVICE_BYTES)
        disk = ArchiveDisk(self._archive, device)
        sock = socket.socket(socket.AF_UNIX)

        def send() -> None:
            with contextlib.suppress(OSError), sock:
                sock.connect(self._path("memory"))
                cluster = 0
                # Its length is where the archive has no more of it: the header has an estimate.
                while not (place := self._archive.find(device.dev_id, cluster)).is_missing:
                    count = min(place.end - cluster, _READ_BYTES // CLUSTER_BYTES)
                    piece = memoryview(bytearray(count * CLUSTER_BYTES))
                    disk.read(piece, cluster * CLUSTER_BYTES)
                    sock.sendall(piece)
                    cluster += count

        thread = threading.Thread(target=send, name="drill-memory", daemon=True)
        thread.start()
        deadline = time.monotonic() + _RESUME_S
        try:
            while True:
                status = machine.qmp.execute(Command("query-status", {}))["status"]
                if status != "inmigrate":
                    return
                if machine.wait(0.05):
                    raise _CannotResume(str(machine.ended()))
                if time.monotonic() > deadline:
                    raise _CannotResume(f"it was not read within {_RESUME_S:.0f} s")
        except QmpGone:
            raise _CannotResume(str(machine.ended())) from None
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()

    # --- The end ---

    def _outcome(
        self,
        seen: Seen,
        watch: Watch,
        machine: OwnQemu,
        consoles: tuple[Console, Console],
        *,
        is_resumed: bool,
    ) -> Outcome:
        decision: Decision = seen.decision
        result = DrillResult(
            archive_uuid=str(uuids.UUID(bytes=self._archive.header.uuid)),
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            verdict=decision.verdict,
            reason=one_line(decision.reason, 2000),
            seconds=decision.seconds,
            proof=decision.proof,
            steps=watch.judge.steps(),
            left_out=tuple(self._omissions),
            accelerator=self._accelerator,
            firmware=self._spec.firmware.kind,
            is_resumed=is_resumed,
            bytes_read=seen.bytes_read,
            evidence="",
        )
        serial, log = consoles
        command = " ".join(["qemu-system-x86_64", *self._words])
        files = {
            "serial.log": serial.transcript.kept(),
            "firmware.log": log.transcript.kept(),
            "qemu.log": "\n".join([command, *machine.said, ""]).encode(errors="replace"),
        }
        if seen.picture is not None:
            files[PICTURE] = encode_png(seen.picture)
        if seen.screen_text:
            files["screen.txt"] = seen.screen_text.encode() + b"\n"
        return Outcome(result, files)


class _CannotResume(Exception):
    """QEMU does not take the machine's memory, and why."""


def _has_places(spec: MachineSpec) -> bool:
    return spec.without_places() != spec


def _accepted(listener: socket.socket) -> Console:
    if not readable([listener.fileno()], _CONNECT_S):
        raise Failure(f"{_NAME}: QEMU does not connect its console")
    return Console(listener)


def _machine_types() -> list[str]:
    """Return the machine types that the installed QEMU knows. Raises Failure."""
    words = [find_qemu(), "-machine", "help"]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_HELP_S, check=False
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    return [line.split()[0] for line in lines if line.split()]


def _forwarded(said: str) -> dict[int, int]:
    """Return by the guest's port the one of this host, from `info usernet`."""
    rows = [line.split() for line in said.splitlines() if "HOST_FORWARD" in line]
    # Kind, descriptor, address and port here, address and port there.
    return {
        int(row[5]): int(row[3])
        for row in rows
        if len(row) > 5 and row[3].isdecimal() and row[5].isdecimal()
    }


class DrillDisks:
    """The disks of a tested machine: the archive's, with nameless files above them for what it writes.

    An NBD server in this process. It ends with `close`; what was written is gone then.
    """

    def __init__(
        self, archive: OpenArchive, sources: Sequence[str], listener: socket.socket, folder: str
    ) -> None:
        """`sources`: the archive's devices, in the order of the exports. Raises Failure."""
        answer_promptly()
        self._overlays: list[OverlayDisk] = []
        try:
            offers = []
            for index, name in enumerate(sources):
                device = device_named(archive, name)
                path, disk = os.path.join(folder, f"writes{index}"), ArchiveDisk(archive, device)
                overlay = OverlayDisk(
                    disk, path, archive_id(archive.header), device.dev_id, is_kept=False
                )
                self._overlays.append(overlay)
                offers.append(writable_offer(DISK_NODE.format(index), overlay, name))
            self._server = Server([listener], offers, archive.tell, reports_failures=True)
            self._server.start()
        except BaseException:
            for overlay in self._overlays:
                overlay.close()
            raise

    @property
    def written_bytes(self) -> int:
        return sum(overlay.stored_bytes for overlay in self._overlays)

    def close(self) -> None:
        self._server.close_intake()
        self._server.finish(time.monotonic() + DRAIN_S)
        for overlay in self._overlays:
            overlay.close()


def device_named(archive: OpenArchive, name: str) -> Device:
    """Raises Failure."""
    for device in archive.header.devices:
        if device.name == name:
            return device
    raise Failure(f"there is no device {name!r} in the archive")


def copy_start(archive: OpenArchive, name: str, length: int, path: str) -> bool:
    """Write the first `length` bytes of a device to a new file; False: it has fewer. Raises Failure."""
    device = device_named(archive, name)
    if device.size_bytes < length:
        return False
    disk = ArchiveDisk(archive, device)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        for at in range(0, length, _READ_BYTES):
            piece = memoryview(bytearray(min(_READ_BYTES, length - at)))
            disk.read(piece, at)
            file.write(piece)
    return True

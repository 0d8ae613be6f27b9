# SPDX-License-Identifier: Apache-2.0
"""The guardian of a domain's backup: the process that talks to libvirt, and outlives all others.

    python -m vmapipe.control.hosts.libvirt.guardian --control-fd N --domain NAME --scratch DIR

The backup's parent gives it orders, JSON lines over a socket pair (guardian_client.py). It begins
libvirt's job, sees that scratch files do not fill up, and ends the job when it is told to or when its
parent is dead. Only it calls libvirt: a call that hangs holds up nobody else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmapipe.control.hosts.libvirt.backup_xml import BackupDisk, backup_xml, checkpoint_xml
from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.hosts.libvirt.domain import NVRAM_NAME, read_domain
from vmapipe.control.hosts.libvirt.jobs import DomainJobs, remove_leftovers, until_reached
from vmapipe.control.hosts.libvirt.scratch import RESERVE_BYTES, ScratchFolder
from vmapipe.control.qemu.disks import TPM_NAME
from vmapipe.control.qemu.qemu_process import command_line, pid_of_qemu, uid_of
from vmapipe.control.qemu.tpm import find_tpm, read_now, read_volume
from vmapipe.runtime.errors import EXIT_FAILED, Failure, os_error_text
from vmapipe.runtime.events import LineSplitter
from vmapipe.runtime.folders import MAX_SOCKET_PATH_BYTES
from vmapipe.runtime.outliving import ignore_ending_signals
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import human_bytes

# How often scratch files are looked at, and how often the job.
_LOOK_S = 0.1
_ASK_S = 1.0
# libvirtd that was killed or is being upgraded comes back within seconds; QEMU goes on meanwhile.
_BACK_S = 60.0
# So long it is tried to end a job whose libvirt does not answer.
_PATIENCE_S = 3600.0
# A firmware's variables have half a megabyte, or some.
_MAX_NVRAM_BYTES = 64 << 20
# In the domain's own folder QEMU may make sockets whatever AppArmor allows it otherwise.
_MASTER_KEY = "master-key.aes"


class DomainGuardian:
    """One backup of one domain. Orders come as dicts; what an order returns is its answer."""

    def __init__(self, control: socket.socket, uri: str, domain: str, place: str) -> None:
        self._control = control
        self._uri, self._domain, self._place = uri, domain, place
        self._jobs: DomainJobs | None = None
        self._folder: ScratchFolder | None = None
        self._socket = ""
        self._checkpoint = ""
        self._limit_bytes = 0
        self._has_job = self._is_lost = False
        self._ask_at = 0.0
        self._orders: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "look": self._look,
            "prepare": self._prepare,
            "begin": self._begin,
            "frozen": self._note_frozen,
            "requests": self._count_requests,
            "end": self._end,
        }

    def run(self) -> int:
        """Obey until the parent says end, or is dead; return the exit code."""
        splitter = LineSplitter()
        is_over = False
        while not is_over:
            if not readable([self._control.fileno()], _LOOK_S if self._has_job else 10.0):
                self._watch()
                continue
            try:
                data = self._control.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return self._take_over()
            for order in splitter.feed(data):
                answer = self._answer(order)
                is_over = order["order"] == "end" and "answer" in answer
                self._send(answer)
        return 0

    def _answer(self, order: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"answer": self._orders[order["order"]](order)}
        except Failure as failure:
            return {"error": str(failure), "code": failure.exit_code}
        except OSError as error:
            return {"error": os_error_text(error), "code": EXIT_FAILED}

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(message).encode() + b"\n")

    # --- Orders ---

    def _look(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Find the domain, remove what a crashed backup has left, and say what there is."""
        host = Host(self._uri)
        jobs = self._jobs = DomainJobs(host, host.domain(self._domain))
        lib = host.lib
        removed = remove_leftovers(jobs, self._place)
        inactive = lib.VIR_DOMAIN_XML_INACTIVE | lib.VIR_DOMAIN_XML_SECURE
        running = jobs.is_running
        answer: dict[str, Any] = {
            "name": jobs.name,
            "uuid": jobs.uuid,
            "running": running,
            "paused": running and jobs.is_paused,
            "inactive": host.call(jobs.domain.XMLDesc, inactive),
            "active": host.call(jobs.domain.XMLDesc, lib.VIR_DOMAIN_XML_SECURE) if running else "",
            "removed": removed,
            "volumes": self._volumes(host, jobs) if not running else {},
            "checkpoints": jobs.checkpoints(),
        }
        pid = pid_of_qemu(None, jobs.uuid) if running else None
        answer["qemu"] = pid or 0
        answer["tpm"] = _why_no_tpm(pid)
        return answer

    @staticmethod
    def _volumes(host: Host, jobs: DomainJobs) -> dict[str, str]:
        """The paths of disks that are volumes of a pool, by target."""
        found = {}
        domain = read_domain(host.call(jobs.domain.XMLDesc, host.lib.VIR_DOMAIN_XML_INACTIVE))
        for disk in domain.disks:
            if disk.kind == "volume":
                pool = host.call(host.connection.storagePoolLookupByName, disk.pool)
                volume = host.call(pool.storageVolLookupByName, disk.path)
                found[disk.target] = str(host.call(volume.path))
        return found

    def _prepare(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Make the scratch folder; say where files and the socket will be."""
        jobs = self._known()
        pid = int(order["qemu"])
        owner = uid_of(pid) if pid else None
        folder = ScratchFolder.make(
            self._place, jobs.uuid, os.geteuid() if owner is None else owner
        )
        self._folder = folder
        self._socket = _socket_path(pid, folder)
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH_BYTES:
            raise Failure(
                f"--scratch {self._place}: a socket below it would have a path of more than "
                f"{MAX_SOCKET_PATH_BYTES} bytes: use a folder with a shorter path"
            )
        return {"folder": folder.path, "socket": self._socket}

    def _begin(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Begin libvirt's job of all disks: this is the instant."""
        jobs, folder = self._known(), self._made()
        self._limit_bytes = int(order["limit"])
        self._checkpoint = str(order["checkpoint"])
        nvram, tpm = str(order["nvram"]), None
        before = _read_nvram(nvram)
        if order["tpm"]:
            tpm = find_tpm(command_line(int(order["qemu"])))
        state = read_volume(tpm) if tpm else b""
        started = time.monotonic()
        # From here on there may be a job, whatever libvirt answers.
        self._has_job = True
        why_full = ""
        try:
            self._begin_job(jobs, order, order["since"])
        except LibvirtFailure as failure:
            lib = jobs.host.lib
            broken = (lib.VIR_ERR_CHECKPOINT_INCONSISTENT, lib.VIR_ERR_NO_DOMAIN_CHECKPOINT)
            if failure.code not in broken or not order["since"]:
                raise
            why_full = str(failure)
            started = time.monotonic()
            self._begin_job(jobs, order, {})
        held_s = time.monotonic() - started
        if _read_nvram(nvram) != before or (tpm and read_now(tpm) != state):
            raise Failure(
                "the firmware's variables or the TPM's state changed in the moment of the instant: "
                "start the backup again"
            )
        if nvram:
            folder.store(NVRAM_NAME, before)
        if tpm:
            folder.store(TPM_NAME, state)
        return {"held_s": held_s, "why_full": why_full}

    def _begin_job(
        self, jobs: DomainJobs, order: Mapping[str, Any], since: Mapping[str, str]
    ) -> None:
        """Begin the job, and a checkpoint where one is wanted. Raises LibvirtFailure."""
        folder = self._made()
        targets, left_out, recorded = order["targets"], order["left_out"], order["recorded"]
        disks = [BackupDisk(name, folder.file(name), since.get(name, "")) for name in targets]
        xml = backup_xml(self._socket, disks, left_out)
        checkpoint = None
        if recorded:
            others = {*targets, *left_out} - set(recorded)
            checkpoint = checkpoint_xml(self._checkpoint, recorded, sorted(others))
        try:
            jobs.host.call(jobs.domain.backupBegin, xml, checkpoint, 0)
        except LibvirtFailure as failure:
            raise LibvirtFailure(
                f"libvirt refuses the backup: {failure}{_hint(str(failure))}", failure.code
            ) from failure

    def _count_requests(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return, by disk, how many reads and writes of the guest there were, and their time (ns)."""
        jobs, found = self._known(), {}
        for target in order["targets"]:
            try:
                told = jobs.host.call(jobs.domain.blockStatsFlags, target)
            except LibvirtFailure:
                continue  # unplugged, or the daemon is being started again
            counts = [told.get(f"{kind}_operations", 0) for kind in ("rd", "wr")]
            times = [told.get(f"{kind}_total_times", 0) for kind in ("rd", "wr")]
            found[target] = [sum(counts), sum(times)]
        return found

    def _note_frozen(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self._made().note_frozen(bool(order["is_frozen"]))
        return {}

    def _end(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """End the job and remove the files."""
        resumed = False
        if self._has_job:
            # A backup that is lost has waited for the daemon already.
            jobs = self._reached(0.0 if self._is_lost else _BACK_S)
            if jobs is None:
                raise Failure("libvirt's daemon does not answer")
            resumed = jobs.end()
            self._has_job = False
            if self._checkpoint:
                self._keep_one(jobs, bool(order["stored"]))
        self._remove_files()
        return {"resumed": resumed}

    def _keep_one(self, jobs: DomainJobs, is_stored: bool) -> None:
        """Of our checkpoints keep that of the archive that is stored, else those that were there."""
        if not is_stored:
            jobs.remove_checkpoint(self._checkpoint)
            return
        for name in jobs.checkpoints():
            if name != self._checkpoint:
                jobs.remove_checkpoint(name)

    # --- Without orders ---

    def _watch(self) -> None:
        """Look after the job: room for scratch files, and that it is there. Tells what is wrong once."""
        if not self._has_job or self._is_lost or self._folder is None:
            return
        text = self._why_full(self._folder)
        if text:
            self._is_lost = True
            # The guest first.
            with contextlib.suppress(Failure):
                if self._known().end():
                    text += "; the guest was paused for a moment, and goes on"
        elif time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + _ASK_S
            text = self._why_lost()
            self._is_lost = bool(text)
        if text:
            self._send({"lost": text})

    def _why_full(self, folder: ScratchFolder) -> str:
        used, free = folder.used_bytes(), folder.free_bytes()
        way_out = (
            "the guest goes on, and the backup has failed. A quieter hour, a quicker archive or more room "
            "(--scratch DIR, --scratch-size) help, or --push, which needs none"
        )
        if self._limit_bytes and used > self._limit_bytes:
            return (
                f"what the guest has overwritten takes {human_bytes(used)} in {folder.path}, more than "
                f"--scratch-size {human_bytes(self._limit_bytes)}: {way_out}"
            )
        if free < RESERVE_BYTES:
            return (
                f"the scratch space is full: {human_bytes(free)} are free in {folder.path}, and "
                f"{human_bytes(used)} are used: {way_out}"
            )
        return ""

    def _why_lost(self) -> str:
        """Return why there is no job any more; empty: there is."""
        jobs = self._known()
        try:
            if jobs.job_xml():
                return ""
            return f"the domain {jobs.name!r} cannot be backed up any more: {jobs.why_ended()}"
        except LibvirtFailure as failure:
            if jobs.host.is_alive:
                return str(failure)
        # The daemon is being started again: QEMU, its jobs and our reading go on.
        try:
            found = self._reached(_BACK_S)
        except LibvirtFailure as failure:
            return str(failure)
        if found is None:
            return f"libvirt's daemon has gone, and has not come back within {_BACK_S:.0f} s"
        return ""

    def _reached(self, patience_s: float) -> DomainJobs | None:
        """Return the domain over a connection that stands."""
        jobs = self._known()
        if not jobs.host.is_alive:
            found = until_reached(self._uri, jobs.uuid, patience_s, self._has_orders)
            if found is None:
                return None
            jobs.host.close()
            self._jobs = jobs = found
        return jobs

    def _has_orders(self) -> bool:
        return bool(readable([self._control.fileno()], 0.0))

    def _take_over(self) -> int:
        """The parent is dead: end all that was begun, however long libvirt takes; the exit code."""
        started = time.monotonic()
        while time.monotonic() - started < _PATIENCE_S:
            try:
                if self._has_job:
                    jobs = until_reached(self._uri, self._known().uuid, 0.0)
                    if jobs is None:
                        time.sleep(1.0)
                        continue
                    jobs.end()
                    if self._checkpoint:
                        # Nobody can say any more that the archive is stored.
                        jobs.remove_checkpoint(self._checkpoint)
                    self._has_job = False
                    self._jobs = jobs
                if self._folder is not None and self._folder.is_frozen:
                    self._known().thaw()
                    self._folder.note_frozen(is_frozen=False)
                self._remove_files()
                return 0
            except LibvirtFailure as failure:
                if failure.code == self._known().host.lib.VIR_ERR_NO_DOMAIN:
                    self._has_job = False
                    self._remove_files()
                    return 0
            except Failure:
                pass  # its storage may be stuck: tried again
            time.sleep(1.0)
        return EXIT_FAILED

    def _remove_files(self) -> None:
        folder, self._folder = self._folder, None
        if folder is None:
            return
        if self._socket != folder.socket:
            with contextlib.suppress(OSError):
                os.unlink(self._socket)
        if text := folder.remove():
            raise Failure(text)

    def _known(self) -> DomainJobs:
        if self._jobs is None:
            raise RuntimeError("there is no domain yet")
        return self._jobs

    def _made(self) -> ScratchFolder:
        if self._folder is None:
            raise RuntimeError("there is no scratch folder yet")
        return self._folder


def _socket_path(pid: int, folder: ScratchFolder) -> str:
    """Return where QEMU is to make the socket of its exports."""
    for word in command_line(pid) if pid else ():
        before, found, _ = word.partition(f"/{_MASTER_KEY}")
        start = before.rfind('"') + 1 if '"' in before else before.rfind("=") + 1
        place = before[start:]
        if found and place.startswith("/") and os.path.isdir(place):
            path = os.path.join(place, f"vmapipe-{folder.run}.sock")
            if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
                return path
    return folder.socket


def _why_no_tpm(pid: int | None) -> str:
    """Return why the TPM's state cannot be read; empty: it can."""
    if pid is None:
        return "its QEMU is not among the processes that we see"
    try:
        read_now(find_tpm(command_line(pid)))
    except Failure as failure:
        return str(failure)
    return ""


def _read_nvram(path: str) -> bytes:
    """Return the firmware's variables; empty for an empty path. Raises OSError."""
    if not path:
        return b""
    with open(path, "rb") as file:
        return file.read(_MAX_NVRAM_BYTES)


def _hint(words: str) -> str:
    """Return the way out of a refusal, if it is known."""
    if "ermission denied" in words:
        return (
            "; QEMU's user must be able to pass through to the folder of --scratch, and AppArmor or "
            "SELinux must let QEMU use it (docs/operations/hosts-libvirt.md)"
        )
    if "not supported" in words or "unsupported" in words.lower():
        return "; --push does without libvirt's own backup job"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe libvirt guardian")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--connect", default="")
    parser.add_argument("--domain", required=True)
    parser.add_argument("--scratch", required=True)
    options = parser.parse_args(argv)
    ignore_ending_signals()
    control = socket.socket(fileno=options.control_fd)
    guardian = DomainGuardian(control, options.connect, options.domain, options.scratch)
    # At once: threads of the library may wait for a daemon that hangs.
    os._exit(guardian.run())


if __name__ == "__main__":
    sys.exit(main())

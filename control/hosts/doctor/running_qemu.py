# SPDX-License-Identifier: Apache-2.0
"""A running QEMU, asked by its monitor what a backup of its machine would meet. Nothing is changed."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from vmapipe.control.hosts.doctor.findings import Diagnosis, Finding, taken
from vmapipe.control.hosts.doctor.releases import (
    Release,
    features_of,
    known_faults,
    release_of,
)
from vmapipe.control.qemu.bitmaps import Bitmap, archive_of, bitmaps_in
from vmapipe.control.qemu.cbw_filters import disks_to_hand_over, needed_release
from vmapipe.control.qemu.disks import DiskChoice, DiskChoiceOptions, Machine, choose_disks
from vmapipe.control.qemu.guest_agent import GuestAgent
from vmapipe.control.qemu.image_damage import (
    Deadline,
    GivenUpError,
    UsedImage,
    find_truncated,
    used_images,
)
from vmapipe.control.qemu.jobs import PREFIX, own_targets
from vmapipe.control.qemu.machine_view import check_run_state, qemu_pid, see_machine
from vmapipe.control.qemu.poweroff import find_poweroff_notes
from vmapipe.control.qemu.qemu_process import uid_of_qemu
from vmapipe.control.qemu.undo import find_memory_notes, find_own_objects
from vmapipe.control.qmp.addresses import Address, is_listening, parse_address
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import Command, QmpLink, ask_if_known
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.folders import temporary_folder
from vmapipe.runtime.text import human_bytes, name_text
from vmapipe.runtime.uuids import uuid_text

# Commands that only read, beside all whose name begins with "query-".
_READING = frozenset({"qom-list", "qom-get", "x-debug-query-block-graph"})
# What freezing needs; an agent's administrator may block commands.
_FREEZING = ("guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status")
_AGENT_S = 5.0
# The tables of many TiB, from a slow disk, take minutes.
_IMAGES_S = 10.0
# A folder for sockets, and what is in it.
_LONGEST_BELOW = 46


class ReadOnlyQmp:
    """A connection to QEMU that sends only commands that change nothing."""

    def __init__(self, link: QmpLink) -> None:
        self._link = link
        self.path, self.peer_pid, self.is_shared = link.path, link.peer_pid, link.is_shared
        self.fd = link.fd

    def execute(self, command: Command) -> Any:
        if not command.name.startswith("query-") and command.name not in _READING:
            raise RuntimeError(f"{command.name} may change something")
        return self._link.execute(command)

    def events(self) -> list[dict[str, Any]]:
        return self._link.events()

    def give_fd(self, fd: int, name: str) -> NoReturn:
        raise RuntimeError("a descriptor that is given away stays there")

    def add_fd(self, fd: int) -> NoReturn:
        raise RuntimeError("a descriptor that is given away stays there")

    def close(self) -> None:
        self._link.close()


class QemuWishes(NamedTuple):
    """The monitor of a QEMU, and how a backup of it would be asked for."""

    qmp: str
    share: bool = False
    agent: str = ""
    with_memory: bool = False
    disks: DiskChoiceOptions = DiskChoiceOptions()


def diagnose_qemu(wishes: QemuWishes, about: str = "") -> Diagnosis:
    """Look at the QEMU behind a monitor. Raises UsageError for an address that is not one."""
    about = about or f"QEMU at {wishes.qmp}"
    try:
        link = open_link(wishes.qmp, share=wishes.share)
    except UsageError:
        raise
    except Failure as failure:
        return Diagnosis(about, [Finding("problem", "monitor", str(failure))])
    try:
        return _QemuExamination(ReadOnlyQmp(link), wishes).diagnosis(about)
    except Failure as failure:
        return Diagnosis(about, [Finding("problem", "monitor", str(failure))])
    finally:
        link.close()


class _QemuExamination:
    """One look at one QEMU."""

    def __init__(self, qmp: ReadOnlyQmp, wishes: QemuWishes) -> None:
        self._qmp = qmp
        self._wishes = wishes
        self._release: Release = ()

    def diagnosis(self, about: str) -> Diagnosis:
        """Raises QmpGone."""
        findings = [*self._version()]
        try:
            check_run_state(self._qmp)
        except Failure as failure:
            findings.append(Finding("problem", "machine", str(failure)))
        findings += self._leftovers()
        machine, _ = see_machine(self._qmp, secrets.token_hex(4))
        choice = DiskChoice((), ())
        try:
            choice = choose_disks(machine, self._wishes.disks)
        except Failure as failure:
            findings.append(Finding("problem", "disks", str(failure)))
        findings += self._read_errors(machine, choice)
        images = used_images(choice.disks, machine.blocks, machine.nodes, machine.graph)
        findings += image_findings(images, qemu_pid(self._qmp))
        findings += self._rights()
        findings += self._agent()
        findings += _bitmap_findings(list(bitmaps_in(machine.nodes)))
        return Diagnosis(about, findings, taken(choice), choice.left_out)

    def _version(self) -> Iterator[Finding]:
        version = ask_if_known(self._qmp, "query-version") or {}
        self._release = release_of(version)
        text = ".".join(map(str, self._release))
        package = str(version.get("package") or "")
        yield Finding("ok", "QEMU", f"{text} {package}".strip())
        needs = ["qmp", *(["state"] if self._wishes.with_memory else [])]
        yield from known_faults(self._release, needs)
        known = self._known_commands()
        lacking = [name for name in ("blockdev-backup", "transaction") if name not in known]
        if lacking:
            yield Finding(
                "problem",
                "QEMU",
                f"it does not know {', '.join(lacking)}",
                "a backup of a machine at rest is possible: vmapipe backup --disk",
            )

    def _known_commands(self) -> set[str]:
        commands = ask_if_known(self._qmp, "query-commands") or ()
        return {str(command.get("name", "")) for command in commands}

    def _leftovers(self) -> Iterator[Finding]:
        left = find_own_objects(self._qmp, PREFIX)
        notes = [*find_memory_notes(self._qmp, PREFIX), *find_poweroff_notes(self._qmp, PREFIX)]
        names = ", ".join(map(name_text, dict.fromkeys([*left.names, *notes])))
        if not names:
            return
        nodes = self._qmp.execute(Command("query-named-block-nodes", {"flat": True}))
        if any(is_listening(Address(target.socket)) for target in own_targets(nodes)):
            yield Finding(
                "problem",
                "another backup",
                f"one of this machine is running, or being ended ({names})",
                "wait for its end: vmapipe status",
            )
        else:
            yield Finding(
                "warning",
                "left-overs",
                f"a crashed backup has left {names}",
                "the next backup removes it, or: vmapipe cleanup --qmp",
            )

    def _read_errors(self, machine: Machine, choice: DiskChoice) -> Iterator[Finding]:
        """Say whose writes fail when old data cannot be read: the guest's, or the backup."""
        schema = ask_if_known(self._qmp, "query-qmp-schema") or ()
        features = features_of(schema)
        if features.breaks_snapshots:
            yield Finding("ok", "read errors", "an error of the storage fails the backup only")
            return
        release = needed_release(self._qmp, features)
        covered = (
            disks_to_hand_over(self._qmp, release, choice.disks, machine.blocks) if release else []
        )
        exposed = [d.name for n, d in enumerate(choice.disks) if n not in covered]
        if exposed:
            yield Finding(
                "warning",
                "read errors",
                "during a backup an error of the storage while old data is read fails the guest's "
                f"write, too, as QEMU's own backup has it: {', '.join(map(name_text, exposed))}",
                "a newer QEMU (10.1 and later never has it)",
            )
        elif choice.disks:
            yield Finding("ok", "read errors", "an error of the storage fails the backup only")

    def _rights(self) -> Iterator[Finding]:
        """Whether QEMU reaches the sockets that a backup makes in TMPDIR."""
        pid = qemu_pid(self._qmp)
        path = parse_address(self._wishes.qmp).path
        uid = uid_of_qemu(path, pid)
        place = temporary_folder(_LONGEST_BELOW)
        if os.geteuid() not in (0, uid):
            yield Finding(
                "problem",
                "sockets",
                f"QEMU runs as uid {uid}, and this as uid {os.geteuid()}: QEMU may not connect to sockets "
                "of ours",
                f"run it as root, or as the user with uid {uid}",
            )
        if pid is None:
            yield Finding(
                "info",
                "sockets",
                "QEMU's process is not seen from here, so its rights are not known",
            )
            return
        if reason := why_not_reached(pid, uid, place):
            yield Finding(
                "problem",
                "sockets",
                f"QEMU (pid {pid}) does not reach {place}, where sockets for it are made: {reason}",
                "TMPDIR=/run/vmapipe, or any other folder that QEMU sees and may enter",
            )
        else:
            yield Finding("ok", "sockets", f"QEMU (pid {pid}, uid {uid}) reaches {place}")
        if profile := confinement(pid):
            yield Finding(
                "warning",
                "sockets",
                f"QEMU is confined ({profile}): the profile may forbid sockets in {place}",
                "docs/operations/troubleshooting.md (AppArmor, SELinux), or vmapipe backup --libvirt",
            )

    def _agent(self) -> Iterator[Finding]:
        if self._wishes.agent:
            yield agent_finding(self._wishes.agent)
            return
        for chardev in ask_if_known(self._qmp, "query-chardev") or ():
            words = f"{chardev.get('label', '')} {chardev.get('filename', '')}"
            if "qga" in words or "guest_agent" in words or "guest-agent" in words:
                is_there = "is" if chardev.get("frontend-open") else "is not"
                yield Finding(
                    "info",
                    "guest agent",
                    f"its channel is {name_text(words.strip())}; the guest {is_there} connected to it",
                    "--agent SOCKET looks whether it can freeze file systems",
                )
                return
        yield Finding(
            "info",
            "guest agent",
            "none was found: a backup is as after a power cut, which journals are made for",
        )


def image_findings(images: Iterable[UsedImage], pid: int | None) -> Iterator[Finding]:
    """Say which images end before their data; of those that are well nothing."""
    deadline = Deadline(_IMAGES_S)
    with contextlib.suppress(GivenUpError):
        for text in find_truncated(images, pid, deadline.check):
            way_out = "restore the disk from an archive of before, or copy what is left of it"
            yield Finding("warning", "images", text, way_out)
        return
    text = f"not all of their tables could be looked at within {_IMAGES_S:.0f} s"
    yield Finding("info", "images", text, "a backup looks at the rest while it runs")


def agent_finding(path: str) -> Finding:
    """Ask a guest's agent, at its socket, whether it could freeze; it does not."""
    try:
        agent = GuestAgent(path)
        try:
            info = agent.execute("guest-info", _AGENT_S)
        finally:
            agent.close()
    except Failure as failure:
        return Finding("problem", "guest agent", str(failure))
    supported = info.get("supported_commands", ()) if isinstance(info, dict) else ()
    known = {c.get("name") for c in supported if isinstance(c, dict) and c.get("enabled")}
    lacking = [name for name in _FREEZING if name not in known]
    if lacking:
        return Finding(
            "problem",
            "guest agent",
            f"it is there, but does not know, or not allow, {', '.join(lacking)}",
            "in the guest: its package's configuration (BLACKLIST_RPC, block-rpcs); or no --agent",
        )
    version = info.get("version", "") if isinstance(info, dict) else ""
    return Finding("ok", "guest agent", f"version {name_text(str(version))}, can freeze")


def why_not_reached(pid: int, uid: int, place: str) -> str:
    """Return why a process does not reach a folder of ours; empty: it does, as far as is known."""
    try:
        ours, theirs = os.stat(place), os.stat(f"/proc/{pid}/root{place}")
    except PermissionError:
        return ""  # only root may look there
    except OSError as error:
        return f"in its own view of the file system: {os_error_text(error)}"
    if not os.path.samestat(ours, theirs):
        return "in its own view of the file system another folder is there (a private /tmp?)"
    if uid == 0:
        return ""
    above = place
    while True:
        status = os.stat(above)
        may = stat.S_IXUSR if status.st_uid == uid else stat.S_IXOTH
        if not status.st_mode & may:
            return f"uid {uid} may not enter {above} (mode {stat.S_IMODE(status.st_mode):o})"
        if above == "/":
            return ""
        above = os.path.dirname(above)


def confinement(pid: int) -> str:
    """Return a process's AppArmor profile or SELinux context; empty: it has none, or it is not known."""
    try:
        with open(f"/proc/{pid}/attr/current", "rb") as file:
            words = file.read(4096).rstrip(b"\0\n").decode(errors="replace")
    except OSError:
        return ""
    return "" if words in ("", "unconfined", "kernel") or "unconfined_t" in words else words


def _bitmap_findings(bitmaps: Sequence[Bitmap]) -> Iterator[Finding]:
    for bitmap in bitmaps:
        archive = archive_of(bitmap.name)
        where = f"{name_text(bitmap.name)} on node {name_text(bitmap.node)}"
        if bitmap.inconsistent or not bitmap.recording:
            why = "QEMU was not ended properly" if bitmap.inconsistent else "it does not record"
            yield Finding(
                "warning" if archive else "info",
                "bitmap",
                f"{where} is worth nothing: {why}",
                "the next backup with --base removes it, and is a full one" if archive else "",
            )
        elif archive:
            yield Finding(
                "ok",
                "bitmap",
                f"{where} records since archive {uuid_text(archive)}: "
                f"{human_bytes(bitmap.dirty_bytes)} have changed",
            )
        else:
            yield Finding("info", "bitmap", f"{where} is another program's, and is left alone")

# SPDX-License-Identifier: Apache-2.0
"""A domain whose disks are moved from an archive to their targets, by libvirt's own copies.

libvirt copies and pivots, so what it says of the domain, and its definition, are right at each moment.
What it cannot say to QEMU goes through its monitor: an export that waits for its server.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmapipe.access.live.carrier import Sight
from vmapipe.access.live.moves import IO_ERROR, MirrorState, Move
from vmapipe.access.live.nodes import PREFIX, LiveDisk, own_nodes_below
from vmapipe.access.live.qemu import read_graph
from vmapipe.access.machine.domain_xml import Element, XmlError, made, parse_xml, render_xml
from vmapipe.control.hosts.libvirt.connect import DAEMON_S, Host, LibvirtFailure, reconnected
from vmapipe.control.qmp.connection import Command, QmpGone, QmpRefused
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.syscalls import readable
from vmapipe.runtime.text import one_line

_WORDS_CHARS = 600
_NOTICE_S, _POLL_S = 2.0, 0.05
# libvirt's copies do not wait where a request fails, and each begins anew.
_MOST_FAILURES = 5
# A daemon that was killed between QEMU's new node and its own note of it numbers the next one alike; with
# each try it counts on. A kill leaves the nodes of one copy, so this is several kills at the same place.
_STALE = re.compile(r"Duplicate nodes with node-name='libvirt-(\d+)-")
_MOST_STALE = 8


class DiskNow(NamedTuple):
    """A disk as libvirt's XML has it. `number`: of its nodes in QEMU; `mirror`: of a copy that is
    under way; `ready`: as there: empty, yes, abort, pivot.
    """

    source: str
    number: str
    mirror: str
    ready: str
    policies: tuple[str, str]


def disks_now(domain: Element) -> dict[str, DiskNow]:
    """Return the disks of a <domain> by their names there. Pure."""
    found = {}
    for disk in domain.find("devices").all("disk"):
        source, mirror, driver = disk.find("source"), disk.find("mirror"), disk.find("driver")
        place = mirror.find("source")
        found[disk.find("target").get("dev")] = DiskNow(
            source.get("file") or source.get("dev"),
            source.get("index"),
            place.get("file") or place.get("dev") or mirror.get("file") or mirror.get("dev"),
            mirror.get("ready"),
            (driver.get("error_policy"), driver.get("rerror_policy")),
        )
    return found


class _Again(Exception):
    """The daemon was started again in the middle of a call: whether it was done is not known."""


class DomainCarrier:
    """A domain by its uuid. A context manager, which closes the connection."""

    def __init__(
        self, uri: str, domain_uuid: str, disks: Sequence[LiveDisk], cancel: Cancel
    ) -> None:
        """Raises Failure."""
        self._uri, self._uuid, self._cancel = uri, domain_uuid, cancel
        self._disks = list(disks)
        # By a disk's name: how its last copy ended, told by a thread of the library's.
        self._ended: dict[str, str] = {}
        self._begun: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._host = Host(uri)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DomainCarrier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._host.close()
        wake, self._wake = self._wake, -1
        os.close(wake)

    def _connect(self) -> None:
        host = self._host
        self._domain = host.call(host.connection.lookupByUUIDString, self._uuid)
        self.name = str(host.call(self._domain.name))
        register, lib = host.connection.domainEventRegisterAny, host.lib
        for kind, tell in (
            (lib.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, self._hear_job),
            (lib.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._hear),
        ):
            host.call(register, self._domain, kind, tell, None)

    def _hear_job(
        self, connection: Any, domain: Any, disk: str, kind: int, status: int, _: Any
    ) -> None:
        lib = self._host.lib
        if status == lib.VIR_DOMAIN_BLOCK_JOB_FAILED:
            self._ended[disk] = "a request failed: is there room for it, can the archive be read?"
            self._failures[disk] = self._failures.get(disk, 0) + 1
        elif status == lib.VIR_DOMAIN_BLOCK_JOB_CANCELED:
            self._ended[disk] = os.strerror(errno.ECANCELED)
        self._hear()

    def _hear(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    # --- Calls ---

    def _call(self, name: str, *words: Any) -> Any:
        """Call a method of the domain's. Raises LibvirtFailure, QmpGone; _Again, connected again."""
        return self._guarded(lambda: self._host.call(getattr(self._domain, name), *words))

    def _guarded(self, job: Callable[[], Any]) -> Any:
        try:
            return job()
        except LibvirtFailure as failure:
            if failure.code == self._host.lib.VIR_ERR_NO_DOMAIN:
                raise QmpGone(f"libvirt has no domain {self.name} any more") from failure
            if self._host.is_alive:
                if failure.code == self._host.lib.VIR_ERR_OPERATION_INVALID and not self._runs():
                    raise QmpGone(f"the domain {self.name} has ended") from failure
                raise
        lost = self._host
        self._host = reconnected(self._uri, DAEMON_S, self._cancel)
        lost.close()
        self._connect()
        raise _Again

    def _runs(self) -> bool:
        """Whether it runs, as far as libvirt tells at once."""
        with contextlib.suppress(LibvirtFailure):
            return bool(self._host.call(self._domain.isActive))
        return True

    def _monitor(self, command: Command) -> Any:
        words = {"execute": command.name, "arguments": dict(command.arguments)}
        answer = json.loads(
            self._guarded(lambda: self._host.monitor_command(self._domain, json.dumps(words)))
        )
        if "error" in answer:
            raise QmpRefused(one_line(str(answer["error"].get("desc")), _WORDS_CHARS))
        return answer.get("return")

    def _parsed(self, flags: int = 0) -> Element:
        """Return the domain's XML. Raises Failure."""
        try:
            return parse_xml(str(self._call("XMLDesc", flags)).encode())
        except XmlError as error:
            raise Failure(f"libvirt's XML of the domain cannot be read: {error}") from error

    def _repeated(self, job: Callable[[], Any]) -> Any:
        """Return the answer to questions, which may be asked twice."""
        while True:
            try:
                return job()
            except _Again:
                self._cancel.check()

    def _while_active(self, job: Callable[[], Any]) -> Any:
        """Return an answer of a machine that runs. Raises QmpGone where it has ended meanwhile."""
        try:
            return job()
        except LibvirtFailure as failure:
            # libvirt notices a little later than its call that QEMU's monitor has gone.
            deadline = time.monotonic() + (_NOTICE_S if "monitor" in str(failure) else 0.0)
            while self.is_active:
                if time.monotonic() >= deadline:
                    raise
                readable([self._cancel.fd], _POLL_S)
            raise QmpGone(f"the domain {self.name} has ended") from None

    # --- As a MoveCarrier ---

    @property
    def fd(self) -> int:
        return self._wake

    def drop_events(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def moves(self, disks: Sequence[LiveDisk]) -> list[Move]:
        # libvirt makes the targets' nodes.
        return [disk.move._replace(adds=()) for disk in disks]

    def check_policies(self, nodes: Sequence[str]) -> None:
        found = self._repeated(lambda: disks_now(self._parsed()))
        for node in nodes:
            if node in found and found[node].policies != ("stop", "stop"):
                raise UsageError(
                    f"disk {node} of the domain {self.name} has not error_policy='stop' "
                    "rerror_policy='stop' any more, so its guest would see an I/O error when the "
                    "archive cannot be read for a moment: `virsh edit` it, and start it again"
                )

    def look(self) -> Sight:
        sight: Sight = self._while_active(lambda: self._repeated(self._look))
        return sight

    def _look(self) -> Sight:
        lib = self._host.lib
        state, reason = self._call("state")[:2]
        if state in (lib.VIR_DOMAIN_SHUTOFF, lib.VIR_DOMAIN_CRASHED):
            raise QmpGone(f"the domain {self.name} has ended")
        run_state = "running"
        if state == lib.VIR_DOMAIN_PAUSED:
            is_failed = reason == lib.VIR_DOMAIN_PAUSED_IOERROR
            run_state = IO_ERROR if is_failed else "paused"
        now = disks_now(self._parsed())
        defined = disks_now(self._parsed(lib.VIR_DOMAIN_XML_INACTIVE))
        jobs: dict[str, MirrorState] = {}
        used = set[str]()
        for disk in self._disks:
            one = now.get(disk.node)
            if one is None:
                continue
            if one.source == disk.overlay:
                used.add(disk.node)
            elif one.source == disk.path:
                # It is there only when the next start, too, is from there.
                used.add(disk.target)
                if disk.node in defined and defined[disk.node].source == disk.overlay:
                    self._redefine({disk.node: self._arrived(disk)})
            if one.mirror:
                jobs[disk.job] = self._mirror(disk, one)
            elif disk.node in used and (state_now := self._ended_job(disk)) is not None:
                jobs[disk.job] = state_now
        named = self._monitor(Command("query-named-block-nodes", {"flat": True}))
        nodes = {str(node.get("node-name", "")) for node in named}
        ours = {node for node in nodes if node.startswith(PREFIX)}
        broken = frozenset(self._call("diskErrors")) if run_state == IO_ERROR else frozenset[str]()
        return Sight(run_state, jobs, frozenset(ours | used), frozenset(used), broken)

    def _mirror(self, disk: LiveDisk, now: DiskNow) -> MirrorState:
        self._begun[disk.node] = 0
        flag = self._host.lib.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
        info = self._call("blockJobInfo", disk.node, flag) or {}
        status = {"": "running", "yes": "ready"}.get(now.ready, "pending")
        speed, done, total = (int(info.get(key, 0)) for key in ("bandwidth", "cur", "end"))
        # It says 0 of 1 before QEMU has looked where there is data.
        return MirrorState(status, speed=speed, done=done, total=total if total > 1 else 0)

    def _ended_job(self, disk: LiveDisk) -> MirrorState | None:
        """A copy that has ended and left the disk where it was; None: there was none."""
        if disk.node in self._ended:
            is_final = self._failures.get(disk.node, 0) > _MOST_FAILURES
            return MirrorState("concluded", self._ended[disk.node], is_final=is_final)
        if disk.node not in self._begun:
            return None
        # Why it ended is told by an event, which may be on its way.
        self._begun[disk.node] += 1
        if self._begun[disk.node] == 1:
            return MirrorState("aborting")
        return MirrorState("concluded", "it is not there any more")

    def execute(self, command: Command) -> Any:
        """Carry out a command of moves.py, by libvirt where it has one."""
        words = command.arguments
        lib = self._host.lib
        calls: Mapping[str, Callable[[], Any]] = {
            "stop": lambda: self._call("suspend"),
            "cont": lambda: self._call("resume"),
            "blockdev-mirror": lambda: self._copy(words),
            "block-job-complete": lambda: self._call(
                "blockJobAbort",
                self._disk(words["device"]).node,
                lib.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT,
            ),
            "block-job-set-speed": lambda: self._call(
                "blockJobSetSpeed",
                self._disk(words["device"]).node,
                words["speed"],
                lib.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES,
            ),
            "job-dismiss": lambda: self._forget(self._disk(words["id"])),
        }
        try:
            return self._while_active(calls.get(command.name, lambda: self._monitor(command)))
        except _Again:
            return None  # it is seen whether it was done
        except LibvirtFailure as failure:
            raise QmpRefused(str(failure)) from failure

    def _disk(self, job: str) -> LiveDisk:
        return next(disk for disk in self._disks if disk.job == job)

    def _forget(self, disk: LiveDisk) -> None:
        self._ended.pop(disk.node, None)
        self._begun.pop(disk.node, None)

    def _copy(self, words: Mapping[str, Any]) -> None:
        lib, disk = self._host.lib, self._disk(words["job-id"])
        self._forget(disk)
        driver = made("driver", name="qemu", type_=disk.image_format, discard="unmap")
        target = made("disk", driver, made("source", file=disk.path), type_="file")
        options: dict[str, int] = {}
        if words["speed"]:
            options = {
                lib.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: words["speed"],
                lib.VIR_DOMAIN_BLOCK_COPY_BUF_SIZE: words["buf-size"],
            }
        flags = (
            lib.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
            | lib.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
            | lib.VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES
        )
        for tries in range(_MOST_STALE, -1, -1):
            try:
                self._call("blockCopy", disk.node, render_xml(target), options, flags)
                break
            except LibvirtFailure as failure:
                stale = _STALE.search(str(failure))
                if stale is None or not tries:
                    raise
                self._remove_stale(stale[1])
        self._begun[disk.node] = 0

    def _remove_stale(self, number: str) -> None:
        """Remove nodes whose number libvirt takes for free; QEMU keeps those that something uses."""
        for kind in ("format", "storage"):
            with contextlib.suppress(QmpRefused):
                self._monitor(Command("blockdev-del", {"node-name": f"libvirt-{number}-{kind}"}))

    # --- The domain ---

    @property
    def host(self) -> Host:
        return self._host

    @property
    def is_active(self) -> bool:
        return bool(self._repeated(lambda: self._call("isActive")))

    def start(self, *, paused: bool) -> None:
        """Start it as it is defined. Raises Failure with libvirt's reason."""
        try:
            self._call("createWithFlags", self._host.lib.VIR_DOMAIN_START_PAUSED if paused else 0)
        except (_Again, LibvirtFailure) as error:
            reason = str(error) or "libvirt's daemon was started again meanwhile"
            raise Failure(f"the domain {self.name} does not start: {reason}") from error

    def destroy_paused(self) -> None:
        """End a machine that was started paused, and has not run yet. Raises Failure."""
        state = self._repeated(lambda: self._call("state"))[0]
        if state == self._host.lib.VIR_DOMAIN_PAUSED:
            with contextlib.suppress(QmpGone):  # it has ended by itself
                self._repeated(lambda: self._call("destroy"))

    def stand_on(self, socket: str, moved: frozenset[str]) -> None:
        """Put each overlay onto an export that waits for its server. Raises Failure.

        libvirt 9.0 gives QEMU one that fails at once, and that one is not needed any more.
        """
        for disk in self._disks:
            if disk.job not in moved:
                try:
                    self._repeated(lambda disk=disk: self._stand(disk, socket))  # type: ignore[misc]
                except (QmpRefused, LibvirtFailure) as error:
                    raise Failure(
                        f"QEMU does not put disk {disk.node} of {self.name} onto the archive: {error}"
                    ) from error

    def _stand(self, disk: LiveDisk, socket: str) -> None:
        one = disks_now(self._parsed()).get(disk.node)
        if one is None or one.source != disk.overlay or one.mirror:
            return
        top, archive = f"libvirt-{one.number}-format", own_nodes_below(disk.job)[0]
        graph = read_graph(_DomainMonitor(self._monitor))
        node = graph.node(top)
        if node is None:
            raise QmpRefused(f"it has no node {top}")
        if archive in graph.tree(top):
            return
        if graph.node(archive) is None:
            self._monitor(Command("blockdev-add", disk.overlay_nodes(socket)[0]))
        cache = node.get("cache", {})
        options = {
            "driver": "qcow2",
            "node-name": top,
            "file": f"libvirt-{one.number}-storage",
            "backing": archive,
            "read-only": False,
            # What is not said would be set back.
            "discard": "unmap",
            "detect-zeroes": node.get("detect_zeroes", "off"),
            "cache": {key: bool(cache.get(key)) for key in ("direct", "no-flush")},
        }
        self._monitor(Command("blockdev-reopen", {"options": [options]}))

    def _arrived(self, disk: LiveDisk) -> Callable[[Element], None]:
        def change(element: Element) -> None:
            element.find("source").attributes = {"file": disk.path}
            element.children = [c for c in element.children if c.tag != "backingStore"]
            driver = element.find("driver")
            driver.attributes = {**driver.attributes, "type": disk.image_format}

        return change

    def restore_drivers(self, drivers: Mapping[str, Mapping[str, str]]) -> None:
        """Give the disks of the definition the options that they have when nothing is live."""

        def changed(node: str) -> Callable[[Element], None]:
            def change(element: Element) -> None:
                element.find("driver").attributes = dict(drivers[node])

            return change

        self._repeated(lambda: self._redefine({node: changed(node) for node in drivers}))

    def _redefine(self, changes: Mapping[str, Callable[[Element], None]]) -> None:
        """Change disks of the definition, and nothing else. Raises Failure."""
        lib = self._host.lib
        root = self._parsed(lib.VIR_DOMAIN_XML_INACTIVE | lib.VIR_DOMAIN_XML_SECURE)
        for disk in root.find("devices").all("disk"):
            name = disk.find("target").get("dev")
            if name in changes:
                changes[name](disk)
        define = self._host.connection.defineXML
        self._guarded(lambda: self._host.call(define, render_xml(root)))


class _DomainMonitor(NamedTuple):
    """Commands to QEMU, as a `Qmp`."""

    ask: Callable[[Command], Any]

    def execute(self, command: Command) -> Any:
        return self.ask(command)

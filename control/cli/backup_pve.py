# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup --pve`: the machines of a Proxmox VE node, one after the other."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmapipe.control.cli.backup import run_job
from vmapipe.control.cli.backup_base import check_base_options
from vmapipe.control.cli.backup_sealing import archive_ending, check_sealing
from vmapipe.control.coordinator.hooks import HookOptions, Hooks
from vmapipe.control.coordinator.observers import (
    JobContext,
    ParentContext,
    Surroundings,
    job_context,
)
from vmapipe.control.coordinator.proxmox import Configs, archive_name, write_mark
from vmapipe.control.coordinator.render import renderer
from vmapipe.control.coordinator.status import JobState, now_s
from vmapipe.control.hosts.pve.defaults import Defaults, notes_of, parse_prune
from vmapipe.control.hosts.pve.guests import LeftOutGuest, select
from vmapipe.control.hosts.pve.lock import BackupLock
from vmapipe.control.hosts.pve.machine import MachineConfig, disks_at_rest
from vmapipe.control.hosts.pve.node import PveNode, root_of
from vmapipe.control.hosts.pve.standstill import Stand, standing_still, undo_for
from vmapipe.control.hosts.pve.storages import PveStorage, Target, backup_target
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError
from vmapipe.runtime.events import ChildCommands, Emit, Event
from vmapipe.runtime.process import failure_of
from vmapipe.vma.names import CONFIG_NAME, FIREWALL_NAME

_COMPRESSED = "zstd"
# Classes of ioprio_set(2), as vzdump's `ionice` chooses them: 8 is idle.
_BEST_EFFORT, _IDLE = 2, 3
_VZDUMP_IDLE = 8
# The port of a machine's guest agent, as qemu-server names it.
_AGENT_PORT = "qga0"

# What names, or belongs to, disks or machines in other ways.
_NOT_WITH_PVE = {
    "disk": "--disk",
    "nbd": "--nbd",
    "qmp": "--qmp",
    "libvirt": "--libvirt",
    "monitor": "--monitor",
    "vmid": "--vmid",
    "agent": "--agent",
    "freeze": "--freeze",
    "config": "--config",
    "state": "--state",
    "force_share": "--force-share",
    "archiver": "--archiver",
    "reproducible": "--reproducible",
    "uuid": "--uuid",
    "manifest": "--manifest",
    "drill": "--drill",
    "drill_plan": "--drill-plan",
    "parent_fd": "--parent-fd",
}


class _Plan(NamedTuple):
    """What is the same for all machines of one command."""

    node: PveNode
    storages: Mapping[str, PveStorage]
    target: Target
    #: Rules by which older archives go when one is stored; empty: none goes.
    keep: Mapping[str, int]
    cluster: str


def backup_machines(options: argparse.Namespace) -> None:
    """Back up all machines that are asked for. Raises Failure when one of them is not stored."""
    _check(options)
    check_base_options(options)
    check_sealing(options)
    node = PveNode(root_of(options.pve_root))
    defaults = node.defaults()
    storages = node.storages()
    target = _target(options, defaults, node, storages)
    remarks = [f"{node.path('/etc/vzdump.conf')}: {text}" for text in defaults.remarks]
    remarks += _apply(options, defaults)
    selection = select(options.pve, [*options.exclude, *defaults.exclude], node.inventory())
    remarks += selection.remarks
    keep = parse_prune(defaults.prune or target.prune) if defaults.removes else {}
    plan = _Plan(node, storages, target, keep or {}, node.cluster())
    cancel = Cancel()
    cancel.on_signals()
    with renderer("backup", options, sys.stdout) as emit:
        for text in remarks:
            emit({"event": "notice", "text": text})
        for guest in selection.left_out:
            emit({"event": "notice", "text": f"VM {guest.vmid} is left out: {guest.reason}"})
        _Session(options, plan, emit, cancel).run(selection.vmids, selection.left_out)


class _Session:
    """The backups of one command."""

    def __init__(
        self, options: argparse.Namespace, plan: _Plan, emit: Emit, cancel: Cancel
    ) -> None:
        self._options = options
        self._plan = plan
        self._emit = emit
        self._cancel = cancel

    def run(self, vmids: Sequence[int], left_out: Sequence[LeftOutGuest]) -> None:
        """Raises Failure when a machine is not stored, Cancelled; the event `machines` says how it went."""
        stored = list[int]()
        failed = [(guest.vmid, guest.reason) for guest in left_out if guest.failed]
        hooks = self._hooks()
        hooks.check()
        with hooks.whole("job-init", "job-start"):
            try:
                for vmid in vmids:
                    self._cancel.check()
                    try:
                        self._one(vmid)
                        stored.append(vmid)
                    except Cancelled as error:
                        failed.append((vmid, str(error)))
                        raise
                    except Exception as error:
                        known = failure_of(error)
                        if known is None:
                            raise  # a defect
                        text = known[0].removeprefix(f"VM {vmid}: ")
                        failed.append((vmid, text))
                        self._emit({"event": "notice", "text": f"FAILED: {_named(vmid, text)}"})
            finally:
                self._emit(
                    {
                        "event": "machines",
                        "stored": stored,
                        "failed": [{"vmid": vmid, "text": text} for vmid, text in failed],
                        "left_out": [
                            {"vmid": guest.vmid, "text": guest.reason}
                            for guest in left_out
                            if not guest.failed
                        ],
                    }
                )
            if failed:
                hooks.state.fail("not all machines are stored", now_s())
        if failed:
            texts = "; ".join(_named(vmid, text) for vmid, text in failed)
            raise Failure(f"{len(failed)} of {len(failed) + len(stored)} not backed up: {texts}")

    def _hooks(self) -> Hooks:
        """Return the hooks of the whole job; each machine has its own."""
        options, target = self._options, self._plan.target
        places = {"DUMPDIR": options.archive}
        if target.storage:
            places["STOREID"] = target.storage
        hook = HookOptions(
            os.path.abspath(options.hook) if "/" in options.hook else options.hook,
            options.hook_timeout,
            environment=places,
        )
        return Hooks(hook, JobState(options.archive, now_s()), self._cancel, self._emit)

    def _one(self, vmid: int) -> None:
        """Back up one machine. Raises Failure, Cancelled."""
        node, target = self._plan.node, self._plan.target
        options = copy.copy(self._options)
        options.vmid = vmid
        options.archive = os.path.join(
            options.archive, archive_name(vmid, time.time(), archive_ending(options))
        )
        if options.metrics:
            options.metrics = f"{options.metrics.removesuffix('.prom')}-{vmid}.prom"
        config = node.config(vmid)
        with contextlib.suppress(Failure):  # said when it is locked, and the log is open
            self._look(options, vmid)
        options.notes = notes_of(
            options.notes,
            vmid=vmid,
            name=config.name or f"VM {vmid}",
            node=node.name,
            cluster=self._plan.cluster,
        )
        variables = {"TARGET": options.archive, "HOSTNAME": config.name}
        if target.storage:
            variables["STOREID"] = target.storage
        held = _HeldLock(node, vmid, options.archive, self._emit)
        parent = ParentContext(self._emit, self._cancel, ChildCommands())
        with (
            job_context(options, options.archive, parent, Surroundings(held, variables)) as around,
            contextlib.ExitStack() as stack,
        ):
            if text := undo_for(node, vmid):
                around.emit({"event": "notice", "text": text})
            # Once more: until it was locked it could be started, or shut down.
            self._look(options, vmid)
            _describe(vmid, held.config, around.emit, options.mode if options.qmp else "")
            self._take(options, vmid, held.config, stack)
            stands = bool(options.qmp) and options.mode in ("stop", "suspend")
            # A guest that is paused, or begins anew, freezes nothing.
            if options.qmp and held.config.freezes and not stands:
                agent = node.socket(vmid, "qga")
                options.agent = _answering_agent(options.qmp, agent, self._cancel, around.emit)
            words, fds = [f"{CONFIG_NAME}="], []
            if rules := node.firewall(vmid):
                fds.append(stack.enter_context(_memory_file(rules)))
                words.append(f"{FIREWALL_NAME}=/dev/fd/{fds[0]}")
            configs = Configs(words, {0: held.config.text}, held.config.disks)
            if not stands:
                run_job(options, None, fds, around, configs)
            else:
                self._run_standing(options, vmid, fds, around, configs)
        if options.protected:
            write_mark(options.archive)
        self._prune(options.archive, vmid)

    def _run_standing(
        self,
        options: argparse.Namespace,
        vmid: int,
        fds: list[int],
        around: JobContext,
        configs: Configs,
    ) -> None:
        """Run the backup of a machine that stands still until its instant. Raises Failure, Cancelled."""
        stand = Stand(
            options.mode,
            vmid,
            options.qmp,
            self._plan.node.note_path(vmid, "standstill"),
            60 * options.stopwait,
        )
        around.hooks.must("pre-stop")
        try:
            with standing_still(stand, self._cancel, around.emit) as standing:

                def told(event: Event) -> None:
                    around.emit(event)
                    if event["event"] == "instant":
                        standing.go_on()

                run_job(options, None, fds, around._replace(emit=told), configs)
        finally:
            around.hooks.may("pre-restart")
            around.hooks.may("post-restart")

    def _look(self, options: argparse.Namespace, vmid: int) -> None:
        """Whether it runs now decides how it is read. Raises Failure."""
        options.qmp, options.qmp_share = None, False
        if self._plan.node.is_running(vmid):
            options.qmp, options.qmp_share = self._plan.node.socket(vmid, "qmp"), True

    def _take(
        self,
        options: argparse.Namespace,
        vmid: int,
        config: MachineConfig,
        stack: contextlib.ExitStack,
    ) -> None:
        """Name the disks of a machine that does not run, as --disk does. Raises Failure."""
        options.disk = []
        if not any(disk.is_backed_up for disk in config.disks):
            # Its configuration is all that there is, as in vzdump's archive of such a machine.
            options.qmp, options.qmp_share = None, False
        if options.qmp:
            return
        node = self._plan.node
        for disk in disks_at_rest(config, self._plan.storages, node.name):
            path = stack.enter_context(node.volume_path(disk.volume))
            options.disk.append(disk.word(path))

    def _prune(self, archive: str, vmid: int) -> None:
        """Remove older archives as vzdump does. A failure is told: the archive is stored all the same."""
        if not self._plan.keep:
            return
        from vmapipe.control.cli.prune import prune_machine

        folder, name = os.path.split(archive)
        try:
            removed = prune_machine(folder, f"vzdump-qemu-{vmid}", self._plan.keep, name)
        except Failure as failure:
            self._emit({"event": "notice", "text": f"VM {vmid}: pruning: {failure}"})
            return
        for old in removed:
            self._emit({"event": "notice", "text": f"VM {vmid}: pruned {old}"})


def _describe(vmid: int, config: MachineConfig, emit: Emit, mode: str) -> None:
    """Tell which machine it is, and what of it no backup takes. `mode` empty: it does not run."""
    emit(
        {
            "event": "machine",
            "vmid": vmid,
            "name": config.name,
            "mode": mode or "stop",
            "runs": bool(mode),
        }
    )
    for key, volume in config.unused:
        reason = f"{volume} is not attached to the machine"
        emit({"event": "skipped", "device": key, "reason": reason, "level": "info"})
    for text in config.remarks():
        emit({"event": "notice", "text": text})


def _named(vmid: int, text: str) -> str:
    return text if text.startswith(f"VM {vmid} ") else f"VM {vmid}: {text}"


class _HeldLock:
    """`lock: backup` around one backup; `config` is the machine's configuration under it."""

    def __init__(self, node: PveNode, vmid: int, archive: str, emit: Emit) -> None:
        self._node, self._vmid, self._emit = node, vmid, emit
        self._archive = archive
        self._lock: BackupLock | None = None
        self.config = MachineConfig("")

    def __enter__(self) -> _HeldLock:
        if self._node.is_dead:
            self.config = self._node.config(self._vmid)
            if self.config.lock:
                text = (
                    f"VM {self._vmid} was locked ({self.config.lock}) when its node died: make sure that "
                    "it was not on its way to another one"
                )
                self._emit({"event": "notice", "text": text})
            return self
        lock = BackupLock(self._node, self._vmid, self._archive)
        try:
            self.config = lock.take()
        except BaseException:
            lock.close()
            raise
        self._lock = lock
        if lock.was_left:
            text = f"VM {self._vmid}: a backup that was killed has left its lock, which is ours now"
            self._emit({"event": "notice", "text": text})
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is None:
            return
        try:
            text = self._lock.release()
        except Failure as failure:
            # Whether the archive is stored does not depend on it.
            text = f"{failure}; `vmapipe cleanup --pve {self._vmid}` removes the lock later"
        if text:
            self._emit({"event": "notice", "text": text})


@contextlib.contextmanager
def _memory_file(text: str) -> Iterator[int]:
    fd = os.memfd_create(FIREWALL_NAME, 0)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _answering_agent(qmp: str, path: str, cancel: Cancel, emit: Emit) -> str:
    """Return the guest agent's socket; empty: it does not answer, and the backup goes on as vzdump's."""
    from vmapipe.control.qemu.guest_agent import GuestAgent
    from vmapipe.control.qmp.client import open_link
    from vmapipe.control.qmp.connection import Command

    try:
        with contextlib.closing(open_link(qmp, share=True)) as link:
            for port in link.execute(Command("query-chardev", {})):
                # QEMU knows at once whether a program in the guest has opened the port.
                if port.get("label") == _AGENT_PORT and not port.get("frontend-open", True):
                    raise Failure("no agent runs in the guest")
        GuestAgent(path, cancel).close()
    except Cancelled:
        raise
    except Failure as failure:
        text = f"the guest's file systems are not frozen, as its configuration says: {failure}"
        emit({"event": "notice", "text": text})
        return ""
    return path


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError."""
    for name, word in _NOT_WITH_PVE.items():
        if getattr(options, name) not in (None, False, "", []):
            raise UsageError(f"{word} and --pve do not go together: --pve finds the disks itself")
    if options.base not in ("none", "auto"):
        raise UsageError("--base with --pve is auto: each machine has a base of its own")
    if options.speed and options.bwlimit:
        raise UsageError("--speed and --bwlimit are the same in two units: say one")


def _target(
    options: argparse.Namespace,
    defaults: Defaults,
    node: PveNode,
    storages: Mapping[str, PveStorage],
) -> Target:
    """Find where the archives go; `options.archive` becomes that folder. Raises UsageError."""
    word = options.archive
    if not word and defaults.storage:
        word = defaults.storage
        if word not in storages:
            raise UsageError(f"/etc/vzdump.conf: storage {word!r} is not configured")
    elif not word and defaults.dump_folder:
        word = node.path(defaults.dump_folder)
    elif not word:
        raise UsageError(
            "say where the archives go: a folder or a storage behind the options, or storage: or "
            "dumpdir: in /etc/vzdump.conf"
        )
    target = backup_target(word, storages, node.name)
    folder, mount_point = target.folder, target.mount_point
    if target.storage:
        folder = node.path(folder)
        mount_point = mount_point and node.path(mount_point)
    node.check_target(folder, mount_point)
    options.archive = os.path.abspath(folder)
    return target


def _apply(options: argparse.Namespace, defaults: Defaults) -> list[str]:
    """Fill in what the command line does not say; return remarks."""
    remarks = []
    if options.bwlimit is not None:
        options.speed = options.bwlimit
    elif not options.speed:
        options.speed = defaults.speed_bytes_s or 0
    if options.compress is None and defaults.compress:
        options.compress = _COMPRESSED
        if defaults.compress != _COMPRESSED:
            remarks.append(
                f"/etc/vzdump.conf: compress: {defaults.compress}: archives are compressed with zstd"
            )
    options.mode = options.mode or defaults.mode or "snapshot"
    options.stopwait = options.stopwait or defaults.stop_minutes
    if options.ionice is None and defaults.ionice is not None:
        idle = defaults.ionice == _VZDUMP_IDLE
        options.ionice = (_IDLE, 0) if idle else (_BEST_EFFORT, defaults.ionice)
    options.hook = options.hook or defaults.script
    if options.encrypt_to and defaults.notes:
        remarks.append("/etc/vzdump.conf: notes: none are made, for the archives are encrypted")
    else:
        options.notes = options.notes or defaults.notes
    options.protected = options.protected or defaults.is_protected
    return remarks

# SPDX-License-Identifier: Apache-2.0
"""A monitor at its socket, until it is told to stop: its commands, and the loop that serves clients.

The disks are served by guards of ours, or are those of a QEMU. `human-monitor-command` carries out the
RFC's commands for people, with its layout of their answers.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from vmapipe.control.monitor.backup_runner import BackupRequest, BackupRunner
from vmapipe.control.monitor.backups import EVENTS
from vmapipe.control.monitor.disks import (
    BackupDevice,
    MachineDisks,
    QemuQueries,
    ServedDisks,
    check_devices,
)
from vmapipe.control.monitor.fdsets import FdSets
from vmapipe.control.monitor.guards import Guards, MonitorDisk
from vmapipe.control.qmp.clients import Client, Clients
from vmapipe.control.qmp.server import (
    Arguments,
    CommandHandler,
    DeferredAnswer,
    QmpError,
    human_size,
)
from vmapipe.control.qmp.sockets import Listener
from vmapipe.runtime.arguments import split_named
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import Emit
from vmapipe.runtime.text import one_line
from vmapipe.vma.names import FIREWALL_NAME

# By command: how many words may follow it, what they are, and what it does.
_COMMANDS = {
    "backup": (3, "backupfile [speed [devlist]]", "create a VM backup"),
    "backup_cancel": (0, "", "cancel the current VM backup"),
    "help": (2, "[cmd]", "show the help"),
    "info": (1, "[subcommand]", "show various information about the system state"),
}
_INFO_HELP = ["info backup  -- show backup status", "info version  -- show vmapipe's version"]


class HumanMonitor:
    """The human monitor: carries out lines by `execute`, which knows the QMP commands."""

    def __init__(self, execute: Callable[[str, dict[str, Any]], Any]) -> None:
        self._execute = execute

    def command(self, line: str) -> str | DeferredAnswer:
        """Carry out a line; return what a person would read; an error is text, too."""
        try:
            words = shlex.split(line)
        except ValueError as error:
            return _text([f"{error}"])
        if not words:
            return ""
        name, *rest = words
        if name not in _COMMANDS:
            return _text([f"unknown command: '{name}'"])
        if len(rest) > _COMMANDS[name][0]:
            return _text([f"{name}: extraneous characters at the end of line"])
        try:
            return self._carry_out(name, rest)
        except QmpError as error:
            return _text([str(error)])

    def _carry_out(self, name: str, words: list[str]) -> str | DeferredAnswer:
        """Carry out one command. Raises QmpError."""
        if name == "backup":
            return self._backup(words)
        if name == "backup_cancel":
            return _silent(self._execute("backup-cancel", {}))
        if name == "info":
            return _text(self._info(words))
        return _text(_INFO_HELP if words == ["info"] else _help(words))

    def _backup(self, words: list[str]) -> str | DeferredAnswer:
        """Begin a backup. Raises QmpError."""
        if not words:
            return _text(["backup: string expected", 'Try "help backup" for more information'])
        arguments: dict[str, Any] = {"backupfile": words[0]}
        if words[1:]:
            arguments["speed"] = human_size(words[1])
        if words[2:]:
            arguments["devlist"] = words[2]
        return _silent(self._execute("backup", arguments))

    def _info(self, words: list[str]) -> list[str]:
        match words:
            case ["backup"]:
                return status_lines(self._execute("query-backup", {}))
            case ["version"]:
                return [self._execute("query-version", {})["package"]]
        return _INFO_HELP


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """The RFC's layout of a BackupStatus; nothing when there was none."""
    if not status:
        return []
    errmsg = f" - {status['errmsg']}" if "errmsg" in status else ""
    total, transferred, zero = status["total"], status["transferred"], status["zero-bytes"]
    return [
        f"Backup status: {status['status']}{errmsg}",
        f"Backup file: {status['backupfile']}",
        f"Backup uuid: {status['uuid']}",
        f"Total size: {total}",
        f"Transferred bytes: {transferred} ({_percent(transferred, total)}%)",
        f"Zero bytes: {zero} ({_percent(zero, total)}%)",
    ]


def _percent(part: int, total: int) -> int:
    return part * 100 // total if total else 0


def _help(words: list[str]) -> list[str]:
    shown = [word for word in _COMMANDS if not words or word == words[0]]
    return [f"{word} {_COMMANDS[word][1]} -- {_COMMANDS[word][2]}" for word in shown]


def _silent(value: Any) -> str | DeferredAnswer:
    """Return an answer without text: successful commands print nothing."""
    if not isinstance(value, DeferredAnswer):
        return ""
    inner, outer = value, DeferredAnswer()

    def answer() -> None:
        try:
            inner.result()
            outer.answer("")
        except QmpError as error:
            outer.answer(_text([str(error)]))

    inner.then(answer)
    return outer


def _text(lines: Iterable[str]) -> str:
    """Join lines with a terminal's line ends, as QEMU has them."""
    return "".join(f"{one_line(line)}\r\n" for line in lines)


FORMATS = ("vma",)
# Members that only Proxmox VE's command has: a client that sends one expects its form of answer.
_PROXMOX = ("firewall-file", "max-workers", "fleecing")


class Disks(Protocol):
    """The disks of a monitor: those that it serves itself, or a QEMU's."""

    #: The options by which `vmapipe backup` finds them.
    argv: Sequence[str]
    takes_state: bool

    def look_up(self, then: Callable[[list[BackupDevice] | QmpError], None]) -> None:
        """Before a backup: which there are now. Raises QmpError."""

    def commands(self) -> Mapping[str, CommandHandler]:
        """Return the commands that tell about the disks."""


class Commands:
    """The commands of a monitor. `options` and `agent` go to each backup; `leave` ends the monitor."""

    def __init__(
        self,
        disks: Disks,
        jobs: BackupRunner,
        options: Sequence[str],
        agent: str,
        leave: Callable[[], None],
    ) -> None:
        self._agent = agent
        self.fdsets = FdSets()
        self._disks = disks
        self._jobs = jobs
        self._options = options
        self._leave = leave

    def table(self, client: Client) -> Mapping[str, CommandHandler]:
        """The commands of one client."""
        table: dict[str, CommandHandler] = {
            "backup": lambda arguments: self._backup(Arguments(arguments)),
            "backup-cancel": self._cancel,
            "backup-set-speed": self._set_speed,
            "query-backup": lambda arguments: _nothing_else(arguments, self._jobs.status()),
            "query-events": lambda arguments: _nothing_else(
                arguments, [{"name": name} for name in EVENTS]
            ),
            "quit": self._quit,
            **self._disks.commands(),
            **self.fdsets.commands(client),
        }
        table |= {
            name.replace("-", "_"): table[name]
            for name in ("backup-cancel", "backup-set-speed", "query-backup")
        }

        def execute(name: str, arguments: dict[str, Any]) -> Any:
            if name == "query-version":
                return client.server.describe_version()
            return table[name](arguments)

        human = HumanMonitor(execute)
        table["human-monitor-command"] = lambda arguments: _human(human, Arguments(arguments))
        return table

    def _backup(self, arguments: Arguments) -> Any:
        """Answered with the archive's uuid when the instant that it shows is behind us."""
        as_proxmox = arguments.has(*_PROXMOX)
        file = arguments.need_text("backup-file", "backupfile", "backup_file")
        image_format = arguments.text("format") or FORMATS[0]
        if image_format not in FORMATS:
            raise QmpError(f"no backup driver for format '{image_format}'")
        argv = self._config_words(arguments)
        devlist = arguments.text("devlist")
        speed = arguments.size("speed") or 0
        with_state = arguments.flag("state")
        # How many clusters QEMU copies at once is ours to choose: a guest's writes wait for them.
        arguments.number("max-workers", "max_workers")
        if arguments.flag("fleecing"):
            raise QmpError(
                "fleecing is not needed: old data waits in memory and in the monitor's --spool"
            )
        arguments.end()
        if with_state and not self._disks.takes_state:
            raise QmpError(
                "there is no state to save: this monitor serves disks and runs no machine; "
                "state needs a monitor with --qmp"
            )
        argv += [*self._options, f"--speed={speed}"]
        if with_state:
            argv.append("--state")
        elif self._agent:
            # What file systems have in the guest's memory is saved with the state.
            argv.append(f"--agent={self._agent}")
        return self._begin(file, devlist, argv, with_state=with_state, as_proxmox=as_proxmox)

    def _begin(
        self,
        file: str,
        devlist: str | None,
        argv: list[str],
        *,
        with_state: bool,
        as_proxmox: bool,
    ) -> DeferredAnswer:
        """Begin a backup with these options. Raises QmpError."""
        output, fds = self._output(file)
        try:
            started = self._jobs.begin(file, with_state=with_state)
        except BaseException:
            _close(fds)
            raise

        def go_on(found: list[BackupDevice] | QmpError) -> None:
            try:
                if isinstance(found, QmpError):
                    raise found
                names = [f"--disk={name}" for name in check_devices(found, devlist)]
            except QmpError as error:
                _close(fds)
                self._jobs.give_up(error)
                return
            self._jobs.start(BackupRequest(file, [*self._disks.argv, *names, *argv, output], fds))

        try:
            self._disks.look_up(go_on)
        except QmpError as error:
            _close(fds)
            self._jobs.give_up(error)
        return _in_an_object(started) if as_proxmox else started

    def _output(self, file: str) -> tuple[str, list[int]]:
        """The archive as `vmapipe backup` takes it, and descriptors for it. Raises QmpError."""
        fd = self.fdsets.open(file)
        if fd is not None:
            return f"fd:{fd}", [fd]
        if file in ("", "-") or file.startswith("fd:") or "\0" in file:
            raise QmpError(
                f"'{file}' is not a valid place for an archive here: name a file, or hand a "
                "descriptor in by add-fd and name it /dev/fdset/N"
            )
        return (f"./{file}" if file.startswith("-") else file), []

    @staticmethod
    def _config_words(arguments: Arguments) -> list[str]:
        """Return the options for configuration files. Raises QmpError for one that cannot be read."""
        config = arguments.text("config-file", "config-filename", "config_filename", "config_file")
        firewall = arguments.text("firewall-file", "firewall_file")
        argv = [] if config is None else [_config_word(os.path.basename(config), config)]
        return argv + ([] if firewall is None else [_config_word(FIREWALL_NAME, firewall)])

    def _cancel(self, arguments: dict[str, Any]) -> Any:
        """Succeeds when nothing runs, too."""
        Arguments(arguments).end()
        return self._jobs.cancel()

    def _set_speed(self, members: dict[str, Any]) -> Any:
        arguments = Arguments(members)
        speed = arguments.size("speed")
        arguments.end()
        if speed is None:
            raise QmpError("Parameter 'speed' is missing")
        if not self._jobs.busy:
            raise QmpError("no backup is running", "DeviceNotActive")
        self._jobs.set_speed(speed)
        return {}

    def _quit(self, arguments: dict[str, Any]) -> Any:
        Arguments(arguments).end()
        self._leave()
        return {}


def _human(human: HumanMonitor, arguments: Arguments) -> Any:
    line = arguments.need_text("command-line")
    arguments.number("cpu-index")
    arguments.end()
    return human.command(line)


def _nothing_else(arguments: dict[str, Any], answer: Any) -> Any:
    Arguments(arguments).end()
    return answer


def _config_word(name: str, path: str) -> str:
    """Return a file as an option.

    Raises QmpError when it cannot be read, or not be named on a command line.
    """
    word = f"{name}={path}"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb"):
            is_meant = split_named(word) == (name, path)
    except (OSError, ValueError, UsageError) as error:
        raise QmpError(f"unable to read file '{path}'") from error
    if not is_meant:
        raise QmpError(f"unable to read file '{path}'")
    return f"--config={word}"


def _in_an_object(started: DeferredAnswer) -> DeferredAnswer:
    """Wrap an answer as Proxmox VE's command does."""
    outer = DeferredAnswer()

    def answer() -> None:
        try:
            outer.answer({"UUID": started.result()})
        except QmpError as error:
            outer.refuse(error)

    started.then(answer)
    return outer


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# What happens wakes it; this is for what only time brings (a guard's next start).
_POLL_S = 1.0


def serve_disks(
    disks: list[MonitorDisk],
    options: argparse.Namespace,
    listener: Listener,
    cancel: Cancel,
    emit: Emit,
) -> None:
    """Serve these disks to guests, and back them up when a client asks. Raises Failure."""
    with Guards(
        disks,
        options.socket_mode,
        emit,
        folder=f"{options.listen}.guards",
        insecure_tcp=options.insecure_plain_tcp,
    ) as guards:
        guards.start(cancel)
        jobs = BackupRunner()
        commands = _commands(ServedDisks(guards, options.listen), jobs, options, cancel)
        emit({"event": "ready", "listen": options.listen, "disks": guards.describe()})
        _serve(listener, jobs, commands, cancel, {guards.fd: lambda: guards.watch(0)}, emit)


def serve_machine(
    options: argparse.Namespace, listener: Listener, cancel: Cancel, emit: Emit
) -> None:
    """Back up the disks of the QEMU at `options.qmp` when a client asks."""
    queries = QemuQueries(options.qmp, share=options.qmp_share)
    jobs = BackupRunner()
    disks = MachineDisks(options.qmp, queries, jobs, share=options.qmp_share)
    commands = _commands(disks, jobs, options, cancel)
    emit({"event": "ready", "listen": options.listen, "disks": []})
    _serve(listener, jobs, commands, cancel, {queries.fd: queries.poll}, emit)


def _commands(
    disks: Disks, jobs: BackupRunner, options: argparse.Namespace, cancel: Cancel
) -> Commands:
    argv = [
        f"--buffer={options.buffer}",
        f"--spool={options.spool}",
        f"--spool-size={options.spool_size}",
        f"--guest-wait={options.guest_wait}",
    ]
    agent = options.agent or ""
    return Commands(disks, jobs, argv, agent, lambda: cancel.ask("ended by a client's quit"))


def _serve(
    listener: Listener,
    jobs: BackupRunner,
    commands: Commands,
    cancel: Cancel,
    beside: Mapping[int, Callable[[], None]],
    emit: Emit,
) -> None:
    """Serve clients until a stop is asked for; a running backup is ended then, in order.

    `beside`: functions to call in each round, by the descriptor that wakes the loop for them.
    """

    def notice(text: str) -> None:
        emit({"event": "notice", "text": text})

    with Clients(listener, commands.table, commands.fdsets.left, notice) as clients:
        jobs.send_event = clients.send_event
        for fd in (cancel.fd, jobs.fd, *beside):
            clients.watch(fd)
        while not cancel.asked:
            clients.serve(_POLL_S)
            for poll in beside.values():
                poll()
            jobs.poll()
            clients.go_on()
        jobs.close()
        clients.go_on()

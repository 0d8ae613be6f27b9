# SPDX-License-Identifier: Apache-2.0
"""`human-monitor-command`: the RFC's commands for people, and its layout of their answers. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vmapipe.control.qmp.server import DeferredAnswer, QmpError, human_size
from vmapipe.runtime.text import one_line

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

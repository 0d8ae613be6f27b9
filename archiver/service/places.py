# SPDX-License-Identifier: Apache-2.0
"""Where the archives of each client go, how much it may store, and what the host has left."""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from vmapipe.archiver.compression import parse_compression
from vmapipe.archiver.manifests import beside
from vmapipe.archiver.service.jobs import Place, Room
from vmapipe.archiver.service.memory import available_memory_bytes
from vmapipe.protocol import jobs
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.cli import size
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Config, Device, check_contents

# A few lines are expected; more is not what we look for.
_MAX_RULES_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one client. `folder`: below the service's; empty: there."""

    folder: str = ""
    quota_bytes: int = 0
    max_jobs: int = 0


class Places:
    """The facts that the core of the service asks for (admission.Facts).

    `rules`: the folder with NAME.toml for clients with rules of their own, read
    anew for each job. `per_client`: a client's archives go into a folder of its
    name.
    """

    def __init__(
        self, directory: str, usual: Rules, rules: Path | None, *, per_client: bool
    ) -> None:
        """Raises Failure."""
        self._directory = os.path.abspath(directory)
        self._usual = usual
        self._rules = rules
        self._per_client = per_client
        if not os.path.isdir(self._directory):
            raise UsageError(f"--directory {directory}: no such folder")
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise Failure(f"--directory {directory}: we may not write there")
        for file in sorted(rules.glob("*.toml")) if rules else ():
            read_rules(file, usual)

    def place(self, client: str, request: jobs.Open) -> Place:
        """Raises RemoteProtocolError."""
        _check_contents(request)
        try:
            rules = self._rules_of(client)
            folder = self._folder_of(rules)
        except Failure as failure:
            raise RemoteProtocolError("failed", f"on the service's side: {failure}") from failure
        path = os.path.join(folder, request.name)
        return Place(
            path,
            exists=os.path.lexists(path) or os.path.lexists(beside(path)),
            max_jobs=rules.max_jobs,
            quota_bytes=rules.quota_bytes,
            used_bytes=_used_bytes(folder) if rules.quota_bytes else 0,
        )

    def room(self) -> Room:
        return Room(shutil.disk_usage(self._directory).free, available_memory_bytes())

    def used_bytes(self, client: str) -> int:
        try:
            return _used_bytes(self._folder_of(self._rules_of(client)))
        except Failure:
            return 0  # rules that cannot be read just now end no job

    def _rules_of(self, client: str) -> Rules:
        """Raises Failure."""
        usual = replace(self._usual, folder=client if self._per_client else "")
        file = self._rules / f"{client}.toml" if self._rules and client else None
        return read_rules(file, usual) if file and file.exists() else usual

    def _folder_of(self, rules: Rules) -> str:
        """Made if it is not there. Raises Failure."""
        if not rules.folder:
            return self._directory
        folder = os.path.join(self._directory, rules.folder)
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            # Not through a link: it could lead anywhere.
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise Failure(f"{folder} is no folder") from None
        except OSError as error:
            raise Failure(f"cannot make {folder}: {os_error_text(error)}") from error
        return folder


def read_rules(file: Path, usual: Rules) -> Rules:
    """`quota`, `jobs` and `directory` of one client. Raises Failure."""
    try:
        with file.open("rb") as opened:
            values = tomllib.loads(opened.read(_MAX_RULES_BYTES).decode())
        rules = usual
        for key, value in values.items():
            match key, value:
                case "quota", str():
                    rules = replace(rules, quota_bytes=size(value))
                case "jobs", int() if value > 0:
                    rules = replace(rules, max_jobs=value)
                case "directory", str() if not jobs.archive_name_fault(value):
                    rules = replace(rules, folder=value)
                case _:
                    raise Failure(
                        f'{file}: {key!r} makes no sense; it may have quota = "500G", jobs = 2, '
                        'directory = "name"'
                    )
    except OSError as error:
        raise Failure(f"cannot read {file}: {os_error_text(error)}") from error
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise Failure(f"{file}: {error}") from error
    if rules.quota_bytes and not rules.folder:
        raise Failure(
            f"{file}: a quota needs a directory of its own: add one, or give the service --per-client"
        )
    return rules


def _used_bytes(folder: str) -> int:
    """Of all files in a client's folder, with what is being written."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # got its final name just now
            used += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return used


def _check_contents(request: jobs.Open) -> None:
    """Raises RemoteProtocolError when no archive could hold these."""
    devices = tuple(Device(index, name, 1) for index, name in enumerate(request.devices, 1))
    configs = tuple(Config(name, data) for name, data in request.configs)
    try:
        check_contents(devices, configs)
        if request.compress:
            parse_compression(request.compress, 1)
    except (LimitError, UsageError) as error:
        raise RemoteProtocolError("bad-contents", str(error)) from error

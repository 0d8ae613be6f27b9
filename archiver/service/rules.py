# SPDX-License-Identifier: Apache-2.0
"""What holds for each client of a service: its folder, its quota, its number of jobs."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from vmapipe.protocol import jobs
from vmapipe.runtime.arguments import size
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.keys import client_names, read_trusted

# A few lines are expected; more is not what we look for.
_MAX_RULES_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for one client. `folder`: below the service's; empty: there."""

    folder: str = ""
    quota_bytes: int = 0
    max_jobs: int = 0


class ClientRules:
    """`usual`: for whoever has none of its own. `folder`: with NAME.toml for clients that have.

    They are read anew for each job. `per_client`: a client's archives go into a
    folder of its name.
    """

    def __init__(self, usual: Rules, folder: Path | None, *, per_client: bool) -> None:
        """Raises Failure for a file that makes no sense."""
        self._usual = usual
        self._folder = folder
        self._per_client = per_client
        for file in sorted(folder.glob("*.toml")) if folder else ():
            read_rules(file, usual)

    def has_others(self, client: str) -> bool:
        """Whether other clients may come than this one."""
        if not self._folder or not client:
            return False
        try:
            return any(name != client for name in client_names(self._folder))
        except OSError:
            return True

    def of(self, client: str) -> Rules:
        """Raises Failure."""
        usual = replace(self._usual, folder=client if self._per_client else "")
        file = self._folder / f"{client}.toml" if self._folder and client else None
        return read_rules(file, usual) if file and file.exists() else usual


def read_rules(file: Path, usual: Rules) -> Rules:
    """`quota`, `jobs` and `directory` of one client. Raises Failure."""
    try:
        values = tomllib.loads(read_trusted(file, _MAX_RULES_BYTES).decode())
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

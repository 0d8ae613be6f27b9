# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet agent`, `probe`, `serve` and `worker`: what runs on hosts, not at a person's terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vmapipe.fleet.inventory import Fleet
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError

Say = Callable[[str], None]


def _cancelled_by_signals() -> Cancel:
    cancel = Cancel()
    cancel.on_signals()
    return cancel


def agent() -> int:
    """Carry out the one request that comes on standard input; return its exit code. Raises Failure."""
    from vmapipe.fleet.agent import serve_one

    def tell(event: Mapping[str, Any]) -> None:
        # Whoever asked may have gone: then its end is seen on standard input, too.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(event), flush=True)

    def found(rules: object) -> Mapping[str, Any]:
        # Imported here: a job does not need it.
        from vmapipe.control.hosts.probe import answer

        return answer(rules)

    return serve_one(sys.stdin.buffer, tell, _cancelled_by_signals(), found)


def probe(rules: str) -> int:
    """Print what this host's machines are by rules with blanks between them. Raises Failure."""
    from vmapipe.control.hosts.probe import answer

    print(json.dumps(answer(rules.split()), indent=1))
    return 0


def serve(fleet: Fleet, dsn: str, state: str, say: Say) -> int:
    """Plan until a signal comes. Raises Failure."""
    from vmapipe.fleet import serve as server

    server.serve(fleet, dsn, state, say, _cancelled_by_signals())
    return 0


def work(fleet: Fleet, host: str, dsn: str, say: Say) -> int:
    """Do the jobs of a host until a signal comes. Raises Failure."""
    from vmapipe.fleet import worker

    if host not in fleet.hosts:
        raise UsageError(f"--host names one of the file's hosts ({', '.join(fleet.hosts)})")
    worker.work(fleet, host, dsn, say, _cancelled_by_signals())
    return 0

# SPDX-License-Identifier: Apache-2.0
"""An archiver service as a backup sees it: how its processes reach it, and what is awaited before they may come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.children import Child, Children
from vmapipe.runtime.errors import EXIT_USAGE, Cancelled, Failure, UsageError
from vmapipe.runtime.events import Emit

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import BaseChosenEvent


class Service(NamedTuple):
    """An archiver service that stores the archive; `link_options`: how this backup's processes reach it."""

    endpoint: str
    link_options: tuple[str, ...] = ()

    def name_of(self, archive: str) -> str:
        """For people: where it is, and what it is called there."""
        return f"{self.endpoint}/{archive}"


def await_opened(
    children: Children,
    archiver: Child,
    emit: Emit,
    cancel: Cancel,
    on_base: Callable[[BaseChosenEvent], None] | None,
) -> None:
    """Until the service has taken the job: only then producers may come. Raises Failure.

    It ends: `archiver` (remote_archiver.py) waits for no answer without a limit.
    """
    opened = False
    while not opened:
        # All that came together, also what comes behind the answer that is awaited.
        for child, event in children.wait(1.0):
            if child is not archiver:
                continue
            if event is not None and event["event"] == "base-chosen":
                if on_base is not None:
                    on_base(event)
            elif event is not None and event["event"] != "error":
                opened = opened or event["event"] == "listening"
                emit(event)
            elif event is None and (child.exit_code or not opened):
                raise (UsageError if child.exit_code == EXIT_USAGE else Failure)(child.verdict())
        if cancel.asked:
            children.stop()
            raise Cancelled(cancel.reason, cancel.signum)

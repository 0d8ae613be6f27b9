# SPDX-License-Identifier: Apache-2.0
"""The run state of a machine, as far as it matters to a backup."""

from __future__ import annotations

from vmapipe.control.qemu.vmstate_commands import migration_progress
from vmapipe.control.qmp.connection import Qmp, ask_if_known
from vmapipe.runtime.errors import Failure


def check_run_state(qmp: Qmp) -> None:
    """Refuse a machine whose disks are another QEMU's, or soon will be. Raises Failure."""
    status = ask_if_known(qmp, "query-status") or {}
    if status.get("status") == "inmigrate":
        raise Failure(
            "the machine waits for an incoming migration (run state inmigrate): its disks are "
            "still the other host's; back it up there, or here when it has arrived"
        )
    if migration_progress(ask_if_known(qmp, "query-migrate") or {}).is_moving:
        raise Failure(
            "the machine is being migrated: back it up when that has ended, where it is then"
        )


def is_running(qmp: Qmp) -> bool:
    """True while the guest runs; a qemu-storage-daemon has none, and counts as running."""
    return bool((ask_if_known(qmp, "query-status") or {}).get("running", True))

# SPDX-License-Identifier: Apache-2.0
"""A machine as its QEMU describes it, only looked at: before a backup begins, and for `vmapipe doctor`."""

from __future__ import annotations

from vmapipe.control.qemu.disks import Machine, storage_outside, tpm_aliases, tpm_outside
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.qemu_process import pid_of_qemu
from vmapipe.control.qemu.tpm import TpmState
from vmapipe.control.qemu.vmstate_commands import migration_progress
from vmapipe.control.qmp.connection import Command, Qmp, QmpLink, ask_if_known
from vmapipe.runtime.errors import Failure


def qemu_pid(link: QmpLink) -> int | None:
    """Return the process of the QEMU behind a monitor; None: it is not found."""
    uuid = str((ask_if_known(link, "query-uuid") or {}).get("UUID", ""))
    return pid_of_qemu(link.peer_pid, uuid)


def see_machine(link: QmpLink, run: str) -> tuple[Machine, TpmState | None]:
    """Return what QEMU says of the machine's storage, and the state of its TPM if it can be read."""
    nodes = link.execute(Command("query-named-block-nodes", {"flat": True}))
    graph = Graph(nodes, ask_if_known(link, "x-debug-query-block-graph"))
    outside = storage_outside(
        {
            path: ask_if_known(link, "qom-list", path=path) or ()
            for path in ("/machine/peripheral", "/machine/peripheral-anon")
        }
    )
    state, added = None, []
    for tpm in ask_if_known(link, "query-tpm") or ():
        try:
            state = TpmState(link, run, qemu_pid(link))
            added.append((state.disk, tpm_aliases(tpm)))
        except Failure as failure:
            outside.append(tpm_outside(tpm, str(failure)))
    blocks = link.execute(Command("query-block", {}))
    jobs = link.execute(Command("query-block-jobs", {}))
    return Machine(blocks, nodes, jobs, graph, outside, added), state


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

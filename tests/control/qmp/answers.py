# SPDX-License-Identifier: Apache-2.0
"""Good answers of QEMU's and ours, and all who read each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from tests.control.qmp.hostile import ANSWERS, DISK
from vmapipe.control.cli.running import job_lines, matching
from vmapipe.control.coordinator.status import JobState
from vmapipe.control.monitor.disks import check_devices, machine_devices
from vmapipe.control.qemu import vmstate_commands
from vmapipe.control.qemu.disks import (
    DiskChoiceOptions,
    Machine,
    choose_disks,
    storage_outside,
    tpm_aliases,
    tpm_outside,
)
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.guest_latency import GuestLatency, remove_histograms
from vmapipe.control.qemu.jobs import own_objects, own_targets
from vmapipe.control.qmp.connection import Command
from vmapipe.control.qmp.server import QmpError
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.event_types import BegunDevice, GuestLatencyEvent
from vmapipe.runtime.latency import bounds_ns

NODES: list[dict[str, Any]] = [
    {**DISK["inserted"], "node-name": "n0"},
    {
        "node-name": "vmapipe-0123abcd-0",
        "drv": "nbd",
        "ro": False,
        "file": "nbd+unix:///x?socket=/tmp/vmapipe-sinks-x/0.sock",
        "image": {"virtual-size": 1 << 20, "filename": "nbd", "format": "nbd"},
        "children": [{"node-name": "f0", "child": "file"}],
    },
    {**DISK["inserted"], "node-name": "f0", "drv": "throttle"},
]

NOTE = vmstate_commands.MemoryNote("/tmp/x", False, "paused", ("events",), 1 << 20).encode()


def a_job() -> dict[str, Any]:
    state = JobState("/backup/vm.vma", 1000.0, job="0123456789abcdef" * 2)
    devices: list[BegunDevice] = [{"dev_id": 1, "name": "a", "bytes": 1 << 20}]
    state.take({"event": "begun", "uuid": "1" * 32, "devices": devices}, 1001.0)
    felt: GuestLatencyEvent = {
        "event": "guest-latency",
        "bound_s": 0.02,
        "requests": 5,
        "p99_s": 0.01,
        "limit_bytes_s": 8 << 20,
        "read_bytes_s": 7 << 20,
    }
    state.take(felt, 1001.5)
    usage = {"name": "the coordinator", "pid": 1, "age_s": 1.5, "cpu_s": 0.5, "rss_bytes": 1 << 20}
    return {**state.details(1002.0), "processes": [usage]}


JOBS: list[dict[str, Any]] = [
    {
        "id": "vmapipe-0123abcd-0",
        "type": "backup",
        "status": "running",
        "error": "x",
        "current-progress": 1,
        "total-progress": 2,
    }
]
GRAPH = {
    "nodes": [
        {"id": 1, "type": "block-driver", "name": "n0"},
        {"id": 2, "type": "block-driver", "name": "f0"},
        {"id": 3, "type": "block-job", "name": "mirror0"},
    ],
    "edges": [
        {"parent": 1, "child": 2, "name": "file"},
        {"parent": 3, "child": 1, "name": "target"},
    ],
}
TPM = [{"id": "tpm0", "model": "tpm-tis", "options": {"type": "emulator", "data": {}}}]
_HISTOGRAM = {"boundaries": bounds_ns(0.02), "bins": [1] * (len(bounds_ns(0.02)) + 1)}
BLOCK_STATS = [
    {
        "device": "",
        "qdev": "/machine/peripheral/scsi0",
        "stats": {
            **{f"{kind}_latency_histogram": _HISTOGRAM for kind in ("rd", "wr")},
            "rd_operations": 5,
            "wr_operations": 6,
            "idle_time_ns": 1,
            "rd_total_time_ns": 7,
            "wr_total_time_ns": 8,
        },
    },
    {"device": "drive0", "stats": {}},
]
#: Good answers, by command.
GOOD: dict[str, Any] = {
    "add-fd": {"fdset-id": 0, "fd": 12},
    "query-block": [DISK, {"device": "cd0", "removable": True}],
    "query-blockstats": BLOCK_STATS,
    "query-named-block-nodes": NODES,
    "query-block-jobs": [{"device": "drive0", "type": "mirror", "len": 1, "speed": 0}],
    "query-jobs": JOBS,
    "query-status": ANSWERS["query-status"],
    "query-memory-size-summary": {"base-memory": 1 << 30, "plugged-memory": 0},
    "query-migrate": {
        "status": "active",
        "error-desc": "no",
        "ram": {"transferred": 1, "total": 2, "normal": 3, "duplicate": 4},
    },
    "query-migrate-capabilities": [{"capability": "events", "state": True}],
    "query-migrate-parameters": {"max-bandwidth": 1 << 20},
    "qom-list": [{"name": "vmapipe-0123abcd-memory", "type": "child<authz-simple>"}],
    "x-debug-query-block-graph": GRAPH,
    "query-tpm": TPM,
    "query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"},
    "qom-get": NOTE,
    "query-disks": [{"name": "a", "size": 1 << 20, "guard": "/run/x"}],
    "query-job": a_job(),
}
EVENT = {
    "event": "BLOCK_JOB_COMPLETED",
    "data": {"device": "vmapipe-0123abcd-0", "error": "x"},
    "timestamp": {"seconds": 1, "microseconds": 2},
}


def read_disks(blocks: Any, nodes: Any, jobs: Any, graph: Any = None) -> None:
    read = Graph(nodes, graph)
    for wanted in ([], ["scsi0"], ["n0"], ["x=f0"]):
        try:
            choose_disks(Machine(blocks, nodes, jobs, read), DiskChoiceOptions(wanted))
        except Failure:
            pass
    for devlist in (None, "scsi0"):
        try:
            check_devices(machine_devices(blocks, nodes), devlist)
        except QmpError:
            pass


def read_nodes(nodes: Any) -> None:
    read_disks(GOOD["query-block"], nodes, [])
    own_objects(JOBS, nodes, "vmapipe-")
    own_targets(nodes)


def read_progress(answer: Any) -> None:
    progress = vmstate_commands.migration_progress(answer)
    vmstate_commands.undo_commands(
        "x", vmstate_commands.decode_memory_note(NOTE), progress, "paused"
    )
    assert isinstance(progress.is_endless, bool)


def read_job(job: Any) -> None:
    job_lines(job, copy.deepcopy(job))
    try:
        matching([job], "0123")
    except Failure:
        pass


class _Counting:
    """A QEMU with these statistics."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def execute(self, command: Command) -> Any:
        return self._answer if command.name == "query-blockstats" else []


def read_block_stats(answer: Any) -> None:
    qmp = _Counting(answer)
    latency = GuestLatency(qmp, 0.02, 1.0, [])
    latency.begin()
    for _ in range(2):
        assert latency.take().requests >= 0
    remove_histograms(qmp)


#: Those who read each answer; whatever is called valid must not surprise them.
READERS: dict[str, Callable[[Any], object]] = {
    "query-block": lambda answer: read_disks(answer, NODES, GOOD["query-block-jobs"]),
    "query-named-block-nodes": read_nodes,
    "query-blockstats": read_block_stats,
    "query-block-jobs": lambda answer: read_disks(GOOD["query-block"], NODES, answer),
    "x-debug-query-block-graph": lambda answer: read_disks(GOOD["query-block"], NODES, [], answer),
    "query-tpm": lambda answer: [(tpm_aliases(tpm), tpm_outside(tpm, "")) for tpm in answer],
    "query-jobs": lambda answer: own_objects(answer, NODES, "vmapipe-").cleanup_commands(),
    "query-migrate": read_progress,
    "query-migrate-capabilities": vmstate_commands.enabled_capabilities,
    "qom-list": lambda answer: (
        vmstate_commands.memory_notes_in(answer, "vmapipe-"),
        storage_outside({"/machine/peripheral": answer}),
    ),
    "query-job": read_job,
}

# SPDX-License-Identifier: Apache-2.0
"""What QEMU does with a device's failed request: the machine has to stand still, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qmp.connection import Command, Qmp, QmpRefused
from vmapipe.runtime.errors import UsageError


def read_graph(qmp: Qmp) -> Graph:
    """Ask QEMU for its block nodes and what stands above them. Raises QmpGone."""
    answer = None
    with contextlib.suppress(QmpRefused):
        answer = qmp.execute(Command("x-debug-query-block-graph", {}))
    return Graph(qmp.execute(Command("query-named-block-nodes", {"flat": True})), answer)


def check_policies(qmp: Qmp, nodes: Sequence[str]) -> None:
    """Refuse a machine whose guest would see an I/O error. Raises UsageError, QmpGone."""
    try:
        blocks = qmp.execute(Command("query-block", {}))
    except QmpRefused:
        return  # a qemu-storage-daemon has no guest
    graph = read_graph(qmp)
    for block in blocks:
        top = str((block.get("inserted") or {}).get("node-name", ""))
        if set(graph.tree(top)) & set(nodes):
            _check_device(qmp, str(block.get("qdev", "")) or str(block.get("device", "")))


def _check_device(qmp: Qmp, name: str) -> None:
    path = name if name.startswith("/") else f"/machine/peripheral/{name}"
    for key in ("rerror", "werror"):
        try:
            policy = qmp.execute(Command("qom-get", {"path": path, "property": key}))
        except QmpRefused:
            raise UsageError(
                f"device {name!r} has no error policy ({key}), so its guest would see an I/O error "
                "when the archive cannot be read for a moment: use virtio-blk, scsi-hd or ide-hd; a "
                "flash memory's disk is restored first, by itself (vmapipe restore --device)"
            ) from None
        if policy != "stop":
            raise UsageError(
                f"device {name!r} has {key}={policy}: start the machine with rerror=stop,werror=stop "
                "on each -device whose disk is in the archive, or its guest would see an I/O error "
                "when the archive cannot be read for a moment"
            )

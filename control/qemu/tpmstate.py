# SPDX-License-Identifier: Apache-2.0
"""The state of a TPM as one of a backup's disks: lent to QEMU, which sends it with the others."""

from __future__ import annotations

import contextlib
import os

from vmapipe.control.qemu.disks import MachineDisk
from vmapipe.control.qemu.outside import TPM_NAME
from vmapipe.control.qemu.owner import command_line
from vmapipe.control.qemu.plan import run_prefix
from vmapipe.control.qemu.tpm import VOLUME_BYTES, find_place, read_now, read_volume
from vmapipe.control.qmp.connection import Command, Link, QmpRefused
from vmapipe.runtime.errors import Failure


class TpmState:
    """In this order: `add`, then the jobs begin, then `check`. All raise Failure."""

    def __init__(self, link: Link, run: str, qemu_pid: int | None) -> None:
        """Raises Failure when it cannot be had, with the reason."""
        if link.is_shared or link.peer_pid is None:
            raise Failure("QEMU takes it only over a Unix socket that is ours (not --qmp-share)")
        if not qemu_pid:
            raise Failure("its QEMU is not among the processes that we see")
        self._link = link
        self._place = find_place(command_line(qemu_pid))
        self._content = read_volume(self._place)
        self._fdset = -1
        self.disk = MachineDisk(TPM_NAME, f"{run_prefix(run)}tpm", VOLUME_BYTES)

    def add(self) -> Command:
        """What makes it a node of QEMU's. It is read here, as it is now."""
        self._content = read_volume(self._place)
        memory = os.memfd_create(TPM_NAME)
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(self._content)
            # QEMU wants a descriptor that cannot be written to for what it only reads.
            lent = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(memory)
        try:
            self._fdset = self._link.add_fd(lent)
        except QmpRefused as error:
            raise Failure(f"disk {TPM_NAME!r}: QEMU does not take it: {error}") from error
        finally:
            os.close(lent)
        file_node = {"driver": "file", "read-only": True, "locking": "off"}
        file_node["filename"] = f"/dev/fdset/{self._fdset}"
        words = {"node-name": self.disk.device, "driver": "raw", "read-only": True}
        return Command("blockdev-add", {**words, "file": file_node})

    def check(self) -> None:
        """Of the instant it is only when nothing has changed until the jobs had begun."""
        # The node has it open; QEMU keeps it no longer than that.
        with contextlib.suppress(QmpRefused):
            self._link.execute(Command("remove-fd", {"fdset-id": self._fdset}))
        if read_now(self._place) != self._content:
            raise Failure(
                f"disk {TPM_NAME!r}: the TPM changed its state in the moment of the instant: start "
                "the backup again"
            )

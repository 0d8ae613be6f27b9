# SPDX-License-Identifier: Apache-2.0
"""The process that freezes a domain's file systems through libvirt, which has its guest agent's socket.

    python -m vmapipe.control.hosts.libvirt.freezer --parent-fd N --domain NAME [--connect URI]

What is sure about its thaw is control/qemu/freezing.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.qemu.freezing import (
    FIND_S,
    FREEZE_S,
    THAW_S,
    AgentRefused,
    Freezing,
    keep_frozen,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Emit
from vmapipe.runtime.process import run_child


class DomainFreezer:
    """A domain's file systems: a `Freezer`."""

    def __init__(self, uri: str, domain: str) -> None:
        self._uri, self._domain = uri, domain
        self.by_hand = f"`virsh domfsthaw {domain}`"

    def reach(self, cancel: Cancel) -> None:
        with closing(Host(self._uri)) as host:
            cancel.check()
            domain = host.domain(self._domain)
            try:
                # The cheapest question that goes to the agent, and does not mark the domain as tainted.
                host.call(domain.getTime, limit_s=FIND_S)
            except LibvirtFailure as failure:
                raise _refused(failure) from failure

    def freeze(self, cancel: Cancel) -> int:
        with closing(Host(self._uri)) as host:
            cancel.check()
            domain = host.domain(self._domain)
            try:
                return int(host.call(domain.fsFreeze, limit_s=FREEZE_S))
            except LibvirtFailure as failure:
                raise _refused(failure) from failure

    def thaw(self) -> None:
        """One attempt, over a connection of its own: the daemon may have been started again."""
        with closing(Host(self._uri)) as host:
            domain = host.domain(self._domain)
            try:
                host.call(domain.fsThaw, limit_s=THAW_S)
            except LibvirtFailure as failure:
                lib = host.lib
                if failure.code == lib.VIR_ERR_OPERATION_INVALID and not host.call(domain.isActive):
                    return  # it has ended, and nothing is frozen
                # libvirt refuses at once where the agent is not there (again) yet: tried again.
                raise


def _refused(failure: LibvirtFailure) -> AgentRefused:
    return AgentRefused(
        f"libvirt cannot freeze the guest: {failure}; is qemu-guest-agent running in the guest? "
        "Without --freeze the backup is as after a power cut"
    )


def freezing_of(uri: str, domain: str) -> Freezing:
    """Return how a domain is frozen."""
    words = [f"--domain={domain}", f"--connect={uri}"]
    return Freezing(
        "vmapipe.control.hosts.libvirt.freezer", words, lambda: DomainFreezer(uri, domain)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe.control.hosts.libvirt.freezer")
    parser.add_argument("--parent-fd", type=int, default=None)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--connect", default="")
    options = parser.parse_args(argv)

    def work(cancel: Cancel, emit: Emit) -> None:
        keep_frozen(DomainFreezer(options.connect, options.domain), cancel, emit)

    return run_child(
        parser.prog, options.parent_fd, work, lambda e: print(e["event"], file=sys.stderr)
    )


if __name__ == "__main__":
    sys.exit(main())

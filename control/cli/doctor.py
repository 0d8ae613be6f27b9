# SPDX-License-Identifier: Apache-2.0
"""`vmapipe doctor`: says what can be backed up here, and how; changes nothing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmapipe.control.cli.backup_arguments import add_domain_options
from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError
from vmapipe.runtime.process import run

if TYPE_CHECKING:
    from vmapipe.control.hosts.doctor.findings import Diagnosis

DESCRIPTION = """\
Say what a backup of a machine would meet: its disks, which are taken and which are
left out, QEMU's version and its known faults, rights to sockets, the guest agent,
dirty bitmaps, scratch space. Without a machine: which machines run here, and which
programs, libraries and rights this host has. Nothing is changed: QEMU and libvirt
are only asked.
"""

EPILOG = """\
signs: ok, -- (worth knowing), !! (a backup succeeds, but), XX (a backup would fail; -> the way out)

examples:
  vmapipe doctor
  vmapipe doctor --qmp /run/vm.qmp --agent /run/vm.qga
  vmapipe doctor --libvirt web --json

exit codes: 0 a backup would not fail, as far as that can be known before; 1 it would, or this is not
the place for it
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_monitor_options(parser, help="the QMP monitor of a QEMU")
    parser.add_argument(
        "--agent",
        metavar="SOCKET",
        default="",
        help="with --qmp: the socket of the guest's agent, which is asked whether it could freeze",
    )
    parser.add_argument(
        "--state",
        action="store_true",
        help="with --qmp: look at what --state of a backup needs, too",
    )
    add_domain_options(parser, help="a domain of libvirt's, by name or uuid")
    parser.add_argument("--pve", type=int, metavar="ID", help="a machine of this Proxmox VE node")
    parser.add_argument("--pve-root", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    return run(prog, lambda: _examine(options))


def _examine(options: argparse.Namespace) -> None:
    if sum(word is not None for word in (options.qmp, options.libvirt, options.pve)) > 1:
        raise UsageError("say one of --qmp, --libvirt and --pve, or none for this host")
    if (options.agent or options.state) and options.qmp is None:
        raise UsageError("--agent and --state belong to --qmp")
    # Imported here: `--help` comes sooner without.
    from vmapipe.control.hosts.doctor.findings import as_json, as_text

    diagnosis = _diagnosis(options)
    if options.json:
        print(json.dumps(as_json(diagnosis)), flush=True)
    else:
        print("\n".join(as_text(diagnosis)), flush=True)
    if problems := diagnosis.problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Failure(f"a backup would fail: {first.topic}: {first.text}{more}")


def _diagnosis(options: argparse.Namespace) -> Diagnosis:
    if options.qmp is not None:
        from vmapipe.control.hosts.doctor.running_qemu import QemuWishes, diagnose_qemu

        return diagnose_qemu(
            QemuWishes(options.qmp, options.qmp_share, options.agent, options.state)
        )
    if options.libvirt is not None:
        from vmapipe.control.hosts.doctor.domains import diagnose_domain

        return diagnose_domain(options.libvirt, options.connect, options.scratch)
    if options.pve is not None:
        from vmapipe.control.hosts.doctor.guests import diagnose_guest
        from vmapipe.control.hosts.pve.node import ROOT_VARIABLE

        return diagnose_guest(options.pve, options.pve_root or os.environ.get(ROOT_VARIABLE, "/"))
    from vmapipe.control.hosts.doctor.this_host import diagnose_host

    cancel = Cancel()
    cancel.on_signals()
    return diagnose_host(cancel)

# SPDX-License-Identifier: Apache-2.0
"""`vmapipe cleanup`: removes what a crashed backup has left in a running QEMU."""

from __future__ import annotations

from collections.abc import Sequence

from vmapipe.control.qmp.addresses import add_monitor_options
from vmapipe.runtime.arguments import make_parser
from vmapipe.runtime.process import run
from vmapipe.runtime.text import MAX_NAME_CHARS, one_line

DESCRIPTION = """\
Remove from a running QEMU the jobs and nodes of a backup that was killed
together with its guardian, and let the guest go on. The next backup does the
same by itself. A backup that still runs is left alone, and so is everything in
QEMU whose name does not begin with `vmapipe-`.
"""

EPILOG = """\
exit codes: 0 nothing of ours is there any more, 1 a backup runs, or QEMU is not to be reached
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_monitor_options(parser, required=True, help="the QMP monitor of this QEMU")
    options = parser.parse_args(argv)
    return run(prog, lambda: _clean_up(options.qmp, share=options.qmp_share))


def _clean_up(address: str, *, share: bool) -> None:
    # Imported here: `--help` comes sooner without.
    from vmapipe.control.qemu.leftovers import connect_or_unblock, remove_leftovers
    from vmapipe.control.qemu.qemu_process import pid_of_qemu, uid_of_qemu
    from vmapipe.control.qmp.addresses import parse_address

    link = connect_or_unblock(address, share=share)
    try:
        path = parse_address(address).path
        removed = remove_leftovers(
            link, lambda: uid_of_qemu(path, pid_of_qemu(link.peer_pid, uuid=""))
        )
    finally:
        link.close()
    names = ", ".join(one_line(name, MAX_NAME_CHARS) for name in removed)
    print(one_line(f"removed {names}") if removed else "there was nothing to remove")

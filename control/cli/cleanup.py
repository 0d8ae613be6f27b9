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
QEMU's records of what has changed since an archive (backup --base) stay, unless
they cannot be used any more; --bitmaps removes them all.
"""

EPILOG = """\
exit codes: 0 nothing of ours is there any more, 1 a backup runs, or QEMU is not to be reached
"""


def main(argv: Sequence[str], prog: str) -> int:
    parser = make_parser(prog, DESCRIPTION, EPILOG)
    add_monitor_options(parser, required=True, help="the QMP monitor of this QEMU")
    parser.add_argument(
        "--bitmaps",
        action="store_true",
        help="remove the records of what has changed since an archive, too (dirty bitmaps): the next "
        "backup with --base is a full one, and QEMU takes and loads internal snapshots again",
    )
    options = parser.parse_args(argv)
    return run(
        prog, lambda: _clean_up(options.qmp, share=options.qmp_share, bitmaps=options.bitmaps)
    )


def _clean_up(address: str, *, share: bool, bitmaps: bool) -> None:
    # Imported here: `--help` comes sooner without.
    from vmapipe.control.qemu.leftovers import (
        connect_or_unblock,
        kept_records,
        remove_leftovers,
        remove_records,
    )
    from vmapipe.control.qemu.qemu_process import pid_of_qemu, uid_of_qemu
    from vmapipe.control.qmp.addresses import parse_address

    link = connect_or_unblock(address, share=share)
    try:
        path = parse_address(address).path
        removed = remove_leftovers(
            link, lambda: uid_of_qemu(path, pid_of_qemu(link.peer_pid, uuid=""))
        )
        if bitmaps:
            removed += remove_records(link)
        kept = kept_records(link)
    finally:
        link.close()
    names = ", ".join(one_line(name, MAX_NAME_CHARS) for name in removed)
    print(one_line(f"removed {names}") if removed else "there was nothing to remove")
    if kept:
        print(one_line(f"kept for incremental backups: {', '.join(kept)} (--bitmaps removes them)"))

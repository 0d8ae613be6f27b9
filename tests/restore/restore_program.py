# SPDX-License-Identifier: Apache-2.0
"""A restore in a process of its own, to be killed: `python -m … ARCHIVE FOLDER unnamed|partial`.

Its events go to standard output, one JSON line each.
"""

from __future__ import annotations

import sys

from vmapipe.restore.archive.reader import open_archive
from vmapipe.restore.job import restore
from vmapipe.restore.targets.plan import plan_folder
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Event, encode_line
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.process import run


def refuse(folder: HeldFolder, mode: int = 0) -> int:
    raise OSError("no unnamed files here")


def tell(event: Event) -> None:
    sys.stdout.buffer.write(encode_line(event))
    sys.stdout.buffer.flush()


def work() -> None:
    archive_name, folder, way = sys.argv[1:]
    if way == "partial":
        HeldFolder.make_unnamed = refuse  # type: ignore[method-assign,assignment]
    cancel = Cancel()
    cancel.on_signals()
    with open_archive(archive_name, cancel) as archive:
        restore(archive, plan_folder(archive.header, folder), tell, cancel)


if __name__ == "__main__":
    sys.exit(run("restore", work))

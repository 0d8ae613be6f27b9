# SPDX-License-Identifier: Apache-2.0
"""A restore in a process of its own, to be killed: `python -m … ARCHIVE FOLDER unnamed|partial|…`.

`partial`: as where files have to have names. `start_workers`, `welcome`: so, too; and it
is killed when it would start its workers, or has started them and they know nothing yet.

Its events go to standard output, one JSON line each.
"""

from __future__ import annotations

import os
import signal
import sys

from vmapipe.restore import job
from vmapipe.restore.archive.reader import open_archive
from vmapipe.restore.targets.plan import plan_folder
from vmapipe.restore.workers.pool import WorkerPool
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.events import Event, encode_line
from vmapipe.runtime.folders import HeldFolder
from vmapipe.runtime.process import run


def refuse(folder: HeldFolder, mode: int = 0) -> int:
    raise OSError("no unnamed files here")


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell(event: Event) -> None:
    sys.stdout.buffer.write(encode_line(event))
    sys.stdout.buffer.flush()


def work() -> None:
    archive_name, folder, way = sys.argv[1:]
    if way != "unnamed":
        HeldFolder.make_unnamed = refuse  # type: ignore[method-assign,assignment]
    if way == "start_workers":
        setattr(job, way, die)
    elif way == "welcome":
        setattr(WorkerPool, way, die)
    cancel = Cancel()
    cancel.on_signals()
    with open_archive(archive_name, cancel) as archive:
        job.restore(archive, plan_folder(archive.header, folder), tell, cancel)


if __name__ == "__main__":
    sys.exit(run("restore", work))

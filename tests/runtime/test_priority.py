# SPDX-License-Identifier: Apache-2.0
"""A process that stands back has less of the processors than others, and cannot fail for it."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import os, threading
from vmapipe.runtime.priority import stand_back

def tell():
    print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_BATCH)

stand_back()
thread = threading.Thread(target=tell)
thread.start()
thread.join()
"""


def told(*prefix: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.strip()


def test_the_threads_of_a_process_that_stands_back_are_low_and_do_not_interrupt_others() -> None:
    assert told() == f"{max(5, os.getpriority(os.PRIO_PROCESS, 0))} True"


def test_who_was_lower_already_stays_there() -> None:
    assert told("nice", "-n", "15").startswith(f"{min(19, 15 + os.getpriority(0, 0))} ")

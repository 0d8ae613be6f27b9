# SPDX-License-Identifier: Apache-2.0
"""A stop by signal wakes whoever waits, at whatever moment it comes."""

from __future__ import annotations

import subprocess
import sys

from tests.machine import LIMIT_S

# The signal comes while the main thread waits, and does not interrupt that wait: so it
# is also for one that comes between Python's last look at signals and the wait.
_PROGRAM = """
import os, signal, threading
from pathlib import Path
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.syscalls import readable

def stop():
    asleep = 0
    while asleep < 50:
        state = Path(f"/proc/self/task/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

cancel = Cancel()
cancel.on_signals()
threading.Thread(target=stop, daemon=True).start()
print(bool(readable([cancel.fd], LIMIT)), cancel.reason, flush=True)
cancel.close()
os._exit(0)
"""


def test_a_signal_that_does_not_interrupt_a_wait_ends_it_all_the_same() -> None:
    program = _PROGRAM.replace("LIMIT", str(LIMIT_S / 3))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.stdout == "True cancelled by SIGTERM\n", done.stderr

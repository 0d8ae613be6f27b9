# SPDX-License-Identifier: Apache-2.0
"""A TPM for a machine that we start: swtpm, with a copy of what the machine's own had kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time

from vmapipe.access.machine.spec import TpmSpec
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.storage_daemon import LastWords, dying_with_parent

_START_S = 10.0
_POLL_S = 0.02
_END_S = 5.0
#: As Proxmox VE's volumes are, and what swtpm takes as one file.
STATE_BYTES = 4 << 20


class Tpm:
    """One swtpm that listens on `socket`; it ends with `close`, with QEMU, or with us."""

    def __init__(self, spec: TpmSpec, state: str, socket: str, cancel: Cancel) -> None:
        """`state`: the file of its state. Raises Failure, Cancelled."""
        program = shutil.which("swtpm")
        if program is None:
            raise Failure("swtpm is not installed here (Debian: swtpm)")
        words = [program, "socket", *(["--tpm2"] if spec.version == "2.0" else [])]
        words += [
            "--tpmstate",
            f"backend-uri=file://{state}",
            "--ctrl",
            f"type=unixio,path={socket}",
        ]
        words += ["--flags", "startup-clear", "--terminate"]
        self._process = subprocess.Popen(
            [*dying_with_parent("KILL"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._words = LastWords(self._process.stderr) if self._process.stderr else None
        deadline = time.monotonic() + _START_S
        try:
            while not os.path.exists(socket):
                cancel.check()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    said = self._words.last if self._words else ""
                    raise Failure(f"swtpm does not start: {said or 'it says nothing'}")
                time.sleep(_POLL_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        if self._words is not None:
            self._words.finish()

# SPDX-License-Identifier: Apache-2.0
"""swtpm, started for a machine."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.machine import LIMIT_S, Need, eventually, listens


@contextlib.contextmanager
def swtpm(need: Need, folder: Path, state: str, *options: str) -> Iterator[None]:
    (program,) = need("swtpm")
    control = folder / "control"
    words = ["socket", "--tpm2", "--tpmstate", state, "--ctrl", f"type=unixio,path={control}"]
    with subprocess.Popen([program, *words, *options], stdout=subprocess.DEVNULL) as process:
        try:
            assert eventually(lambda: listens(control))
            yield
        finally:
            process.terminate()
            process.wait(LIMIT_S)
    control.unlink(missing_ok=True)

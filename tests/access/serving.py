# SPDX-License-Identifier: Apache-2.0
"""`vmapipe serve`, run as a user runs it, for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.machine import LIMIT_S, VMAPIPE


class Served:
    """A running server; `uri` of an export, and the lines that it said on stderr at the end."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self.socket = socket
        self.said = ""

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"


@contextlib.contextmanager
def serving(
    socket: Path, *words: str | Path, cached: bool = False, before: Sequence[str] = ()
) -> Iterator[Served]:
    """Serves until the block ends, then stops it: that is no failure."""
    command = [*before, *VMAPIPE, "serve", "--json", "--listen", str(socket)]
    command += [] if cached else ["--no-index-cache"]
    process = subprocess.Popen(
        [*command, *map(str, words)],
        # With a buffer, what is said right behind the line that we wait for would be read
        # ahead with it, and lost to communicate().
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    served = Served(process, socket)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            served.said += line.decode()
            if json.loads(line)["event"] == "exported":
                break
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            stdout, stderr = process.communicate(timeout=LIMIT_S)
            served.said += stdout.decode() + stderr.decode()
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
    assert process.returncode == 0, served.said
    assert "Traceback" not in served.said, served.said

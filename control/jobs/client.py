# SPDX-License-Identifier: Apache-2.0
"""Asks a running backup, over its socket."""

from __future__ import annotations

import json
import socket
from typing import Any

from vmapipe.runtime.errors import Failure, os_error_text

# A job answers within a second, but not while it waits for QEMU or for a guest's file systems.
_ANSWER_S = 10.0
_MAX_ANSWER_BYTES = 1 << 20


class JobClient:
    """A connection to one job. Every method raises Failure."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_S)
        try:
            self._socket.connect(path)
            self._lines = self._socket.makefile("rb")
        except OSError as error:
            self._socket.close()
            raise Failure(f"{path}: {os_error_text(error)}; has the backup ended?") from error
        try:
            self._read()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> JobClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._failure(error) from error
        while "return" not in (answer := self._read()):
            if "error" in answer:
                raise Failure(str(answer["error"].get("desc", "refused")))
        return answer["return"]

    def wait_for_end(self, timeout_s: float) -> bool:
        """Whether the job has ended, and closed its end, by then."""
        self._socket.settimeout(timeout_s)
        try:
            while self._lines.readline(_MAX_ANSWER_BYTES):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass  # it was killed
        return True

    def _read(self) -> Any:
        try:
            line = self._lines.readline(_MAX_ANSWER_BYTES)
        except OSError as error:
            raise self._failure(error) from error
        if not line:
            raise Failure(f"{self._path}: the backup has just ended")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Failure(f"{self._path}: the answer makes no sense; is it a backup's socket?")
        return answer

    def _failure(self, error: OSError) -> Failure:
        if isinstance(error, TimeoutError):
            return Failure(f"{self._path}: the backup has not answered for {_ANSWER_S:.0f} s")
        return Failure(f"{self._path}: {os_error_text(error)}")

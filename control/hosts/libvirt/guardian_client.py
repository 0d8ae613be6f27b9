# SPDX-License-Identifier: Apache-2.0
"""The coordinator's end of a guardian of a domain's backup: orders, answers, and what has gone wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import Any

from vmapipe.runtime.errors import Cancelled, Failure
from vmapipe.runtime.events import LineSplitter
from vmapipe.runtime.outliving import start_outliving
from vmapipe.runtime.syscalls import readable

# What an order may take: libvirt's own calls, one after the other, and some to spare.
_ANSWER_S = 120.0


class DomainGuardianClient:
    """A guardian process, started here. `ask` raises Failure, Cancelled."""

    def __init__(self, uri: str, domain: str, scratch: str) -> None:
        self._socket, self._process = start_outliving(
            "vmapipe.control.hosts.libvirt.guardian",
            [f"--connect={uri}", f"--domain={domain}", f"--scratch={scratch}"],
        )
        self._splitter = LineSplitter()
        self._answers: list[dict[str, Any]] = []
        #: True: it has ended, whatever it had to do.
        self.is_gone = False
        #: What has gone wrong meanwhile; empty: nothing.
        self.lost = ""

    @property
    def fd(self) -> int:
        """Readable when `take` has something to see."""
        return self._socket.fileno()

    def ask(self, order: str, wait_fd: int = -1, **words: Any) -> dict[str, Any]:
        """Give an order, and return its answer. Whoever makes `wait_fd` readable ends the wait."""
        deadline = time.monotonic() + _ANSWER_S
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps({"order": order, **words}).encode() + b"\n")
        fds = [self.fd, *([wait_fd] if wait_fd >= 0 else [])]
        while not self._answers:
            left = deadline - time.monotonic()
            ready = readable(fds, max(0.0, left))
            if wait_fd in ready:
                raise Cancelled("cancelled while libvirt was asked")
            if not ready:
                raise Failure(f"libvirt has not answered within {_ANSWER_S:.0f} s ({order})")
            self.take()
            if self.is_gone and not self._answers:
                raise Failure(self.lost)
        answer = self._answers.pop(0)
        if "error" in answer:
            failure = Failure(answer["error"])
            failure.exit_code = answer["code"]
            raise failure
        return dict(answer["answer"])

    def take(self) -> None:
        """Read what it has said by now."""
        if not readable([self.fd], 0.0):
            return
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self.is_gone = True
            self.lost = self.lost or "the guardian, which talks to libvirt for us, was killed"
        for message in self._splitter.feed(data):
            if "lost" in message:
                self.lost = self.lost or message["lost"]
            else:
                self._answers.append(message)

    def leave(self) -> None:
        """End the conversation: it ends by itself, in its own time, whatever is left to do."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)

# SPDX-License-Identifier: Apache-2.0
"""A QMP monitor of a domain's QEMU, whose own monitor is libvirt's: a process between the two.

    python -m vmapipe.control.hosts.libvirt.monitor_proxy --control-fd N --domain NAME [--connect URI]

Commands go through virDomainQemuMonitorCommand, events come by libvirt's own. It serves one client at a
time, as QEMU does, and lives as long as anything of ours is in QEMU: a backup's guardian needs it then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from vmapipe.control.hosts.libvirt.connect import Host, LibvirtFailure
from vmapipe.control.qemu.jobs import PREFIX
from vmapipe.control.qmp.server import RequestReader
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.outliving import ignore_ending_signals, start_outliving
from vmapipe.runtime.syscalls import readable

# A transaction waits for what the guest has under way; our clients wait 30 s for an answer.
_COMMAND_S = 40.0
# How often it is looked whether anything of ours is left, when nobody needs us otherwise.
_LOOK_S = 1.0
_READ_BYTES = 1 << 16
# Of SCM_RIGHTS: a command comes with one descriptor at most.
_MOST_FDS = 4
# A client that does not read events for so long hangs.
_SEND_S = 10.0
_START_S = 40.0


class MonitorProxy:
    """The monitor of one domain."""

    def __init__(
        self, uri: str, name: str, listener: socket.socket, lifeline: socket.socket
    ) -> None:
        self._host = Host(uri)
        self._domain = self._host.domain(name)
        self._listener, self._lifeline = listener, lifeline
        self._client: socket.socket | None = None
        # Both threads send: answers, and events.
        self._lock = threading.Lock()
        self._host.watch_monitor(self._domain, self._send_event)

    def run(self) -> None:
        """Serve until the parent is dead and QEMU has nothing of ours."""
        has_parent = True
        while True:
            fds = [self._listener.fileno(), *([self._lifeline.fileno()] if has_parent else [])]
            ready = readable(fds, _LOOK_S)
            if self._lifeline.fileno() in ready:
                has_parent = False
            if self._listener.fileno() in ready:
                client, _ = self._listener.accept()
                with client:
                    self._serve(client)
            elif not has_parent and not self._is_needed():
                return

    def _is_needed(self) -> bool:
        """Tell whether QEMU still has something of ours."""
        try:
            answers = [
                self._ask({"execute": "query-jobs"}, []),
                self._ask({"execute": "query-named-block-nodes", "arguments": {"flat": True}}, []),
                self._ask({"execute": "qom-list", "arguments": {"path": "/objects"}}, []),
            ]
            return any(f'"{PREFIX}' in answer for answer in answers)
        except LibvirtFailure:
            try:
                return bool(self._host.call(self._domain.isActive))
            except LibvirtFailure:
                return False

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(_SEND_S)
        version = json.loads(self._ask({"execute": "query-version"}, [])).get("return", {})
        with self._lock:
            self._client = client
        try:
            self._send({"QMP": {"version": version, "capabilities": []}})
            reader = RequestReader()
            while True:
                if not readable([client.fileno()], 60.0):
                    continue
                data, fds, _, _ = socket.recv_fds(client, _READ_BYTES, _MOST_FDS)
                try:
                    if not data:
                        return
                    for request in reader.feed(data):
                        self._answer(request.value or {}, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except OSError:
            pass  # it has left
        finally:
            with self._lock:
                self._client = None

    def _answer(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        number = request.pop("id", None)
        answer: dict[str, Any]
        if request.get("execute") == "qmp_capabilities":
            answer = {"return": {}}
        else:
            try:
                answer = json.loads(self._ask(request, fds))
            except (LibvirtFailure, ValueError) as error:
                answer = {"error": {"class": "GenericError", "desc": str(error)}}
            answer.pop("id", None)
        if number is not None:
            answer["id"] = number
        self._send(answer)

    def _ask(self, request: dict[str, Any], fds: Sequence[int]) -> str:
        """Raises LibvirtFailure."""
        return self._host.monitor_command(self._domain, json.dumps(request), fds, _COMMAND_S)

    def _send_event(self, name: str, seconds: int, microseconds: int, details: str) -> None:
        """Called by the library's thread."""
        event: dict[str, Any] = {
            "event": name,
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
        }
        if details:
            event["data"] = json.loads(details)
        self._send(event)

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._client is not None:
                self._client.sendall(json.dumps(message).encode() + b"\r\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe libvirt monitor proxy")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--connect", default="")
    parser.add_argument("--domain", required=True)
    options = parser.parse_args(argv)
    # A backup's guardian needs it whatever ends the backup.
    ignore_ending_signals()
    control = socket.socket(fileno=options.control_fd)
    try:
        with OwnFolder("qmp") as folder, socket.socket(socket.AF_UNIX) as listener:
            path = os.path.join(folder.path, "qmp.sock")
            listener.bind(path)
            listener.listen(4)
            proxy = MonitorProxy(options.connect, options.domain, listener, control)
            control.sendall(json.dumps({"path": path}).encode() + b"\n")
            proxy.run()
    except Failure as failure:
        with contextlib.suppress(OSError):
            control.sendall(json.dumps({"error": str(failure)}).encode() + b"\n")
        os._exit(1)
    # At once: threads of the library may wait for a daemon that hangs.
    os._exit(0)


class MonitorProxyClient:
    """A proxy process, started here; `path` is its socket."""

    def __init__(self, uri: str, domain: str) -> None:
        """Raises Failure."""
        self._socket, self._process = start_outliving(
            "vmapipe.control.hosts.libvirt.monitor_proxy",
            [f"--connect={uri}", f"--domain={domain}"],
        )
        deadline, said = time.monotonic() + _START_S, b""
        while not said.endswith(b"\n") and time.monotonic() < deadline:
            if readable([self._socket.fileno()], 1.0):
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    break
                said += data
        answer = json.loads(said) if said.endswith(b"\n") else {}
        self.path = str(answer.get("path", ""))
        if not self.path:
            self.close()
            raise Failure(answer.get("error") or "the proxy of libvirt's monitor does not start")

    def close(self) -> None:
        """Let it end as soon as QEMU has nothing of ours."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)


if __name__ == "__main__":
    sys.exit(main())

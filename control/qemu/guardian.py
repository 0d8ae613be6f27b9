# SPDX-License-Identifier: Apache-2.0
"""The guardian: the process that outlives all others of a backup, so that no guest's write fails.

The coordinator starts it first of all, and tells it what to protect before QEMU is touched (`GuardianClient`). It holds the sinks' listening sockets and the memory's stream, and waits. When a producer dies, or stands
still, it serves QEMU in its place. When the coordinator dies, or says so, it ends the producers,
serves all of QEMU's connections, lets the guest go on, and only when they stand
it cancels the jobs and removes the nodes. Everything that it needs is loaded at its start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.control.qemu.drop_targets import DropTarget, StreamDrain
from vmapipe.control.qemu.jobs import disk_index, run_prefix
from vmapipe.control.qemu.sink_folder import SinkFolder
from vmapipe.control.qemu.undo import clean_up
from vmapipe.control.qmp.addresses import Address, is_listening, parse_address
from vmapipe.control.qmp.client import open_link
from vmapipe.control.qmp.connection import QmpGone
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.outliving import ignore_ending_signals, start_outliving

READY = b"ready"
# What it protects: each sink and the memory's stream come with a descriptor, the folder comes last.
SINK, STREAM, FOLDER = b"sink ", b"stream", b"folder "
WATCH = b"watch "
TAKE_OVER = b"take over"
BYE = b"bye"
# A path, and a word before it.
MAX_MESSAGE_BYTES = 4096 + 64

# A producer that was stopped (Ctrl-Z, SIGSTOP) does not answer, and the guest
# waits; looked at so often, and ended when it stands still this many times.
_POLL_MS = 1000
_STOPPED_POLLS = 5
# A monitor that is taken by another client may become free: tried this often.
_RETRY_S = 0.5
# Nothing listens at the monitor's path and no client is connected to us: QEMU is gone.
_GONE_S = 2.0
# Without a monitor the jobs still end by themselves, all dropped. A longer
# wait would be for something else than QEMU.
_PATIENCE_S = 3600.0


class Guardian:
    """The guardian of one backup. Producers are registered later, one pidfd a target."""

    def __init__(
        self,
        qmp: str,
        share: bool,
        run: str,
        folder: str,
        targets: Sequence[DropTarget | StreamDrain],
        control: socket.socket,
    ) -> None:
        self._qmp = qmp
        self._share = share
        self._run = run
        self._folder = folder
        # What each producer serves, in their order: sinks, and maybe the memory's stream.
        self._targets = targets
        self._sinks = [target for target in targets if isinstance(target, DropTarget)]
        self._control = control
        # By pidfd: the target's number, and for how many polls it has stood still.
        self._producers: dict[int, int] = {}
        self._stopped: dict[int, int] = {}

    def watch(self) -> bool:
        """Wait until the backup is over; True: this process has to take over."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        self._send(READY)
        while True:
            for fd, _ in poller.poll(_POLL_MS) or self._end_stopped():
                if fd != self._control.fileno():
                    poller.unregister(fd)
                    self._serve_for(fd)
                    continue
                message, pidfds = self._receive()
                if message.startswith(WATCH) and pidfds:
                    self._producers[pidfds[0]] = int(message.removeprefix(WATCH))
                    poller.register(pidfds[0], select.POLLIN)
                else:
                    # Asked to, or the coordinator is dead.
                    return message != BYE

    def _end_stopped(self) -> tuple[tuple[int, int], ...]:
        """Kill producers that have been stopped for long: a guest would wait for them for ever."""
        for pidfd in self._producers:
            polls = self._stopped.get(pidfd, 0) + 1 if is_stopped(pidfd) else 0
            self._stopped[pidfd] = polls
            if polls >= _STOPPED_POLLS:
                _kill(pidfd)
        return ()

    def take_over(self) -> bool:
        """End the producers and serve QEMU in their place; tell whether QEMU is clean, or gone, at
        the end.
        """
        for pidfd in self._producers:
            # One that lives would answer beside us, and one that hangs would not.
            _kill(pidfd)
        for target in self._targets:
            target.start()
        is_clean = self._clean()
        folder = SinkFolder.find(self._folder)
        if folder is not None:
            folder.remove()
            folder.close()
        return is_clean

    def _clean(self) -> bool:
        started = time.monotonic()
        alone_since = started
        while time.monotonic() - started < _PATIENCE_S:
            try:
                qmp = open_link(self._qmp, share=self._share)
                try:
                    clean_up(qmp, run_prefix(self._run), self._is_served)
                    return True
                finally:
                    qmp.close()
            except QmpGone:
                if any(sink.clients for sink in self._sinks) or self._has_monitor():
                    alone_since = time.monotonic()
                if time.monotonic() - alone_since > _GONE_S:
                    return True
            except (Failure, LookupError, TypeError, ValueError):
                pass  # something else uses them: as long as we are here, nothing fails
            time.sleep(_RETRY_S)
        return False

    def _is_served(self, job: str) -> bool:
        index = disk_index(job)
        return not 0 <= index < len(self._sinks) or self._sinks[index].served

    def _has_monitor(self) -> bool:
        """Tell whether a process listens at the monitor's address, busy or not."""
        return is_listening(parse_address(self._qmp))

    def _serve_for(self, pidfd: int) -> None:
        self._targets[self._producers[pidfd]].start()

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
        except OSError:
            return b"", []
        return message, fds

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self._control.send(message)


def is_stopped(pidfd: int) -> bool:
    try:
        with open(f"/proc/self/fdinfo/{pidfd}") as file:
            pid = next(line.split()[1] for line in file if line.startswith("Pid:"))
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, LookupError, StopIteration):
        return False


def _kill(pidfd: int) -> None:
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _go_last_when_memory_runs_out() -> None:
    # Only root may ask for that.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vmapipe guardian", description=__doc__)
    for word in ("--qmp", "--run"):
        parser.add_argument(word, required=True)
    parser.add_argument("--qmp-share", action="store_true")
    parser.add_argument("--control-fd", type=int, required=True)
    options = parser.parse_args(argv)
    ignore_ending_signals()
    _go_last_when_memory_runs_out()
    control = socket.socket(fileno=options.control_fd)
    targets: list[DropTarget | StreamDrain] = []
    folder = ""
    while not folder:
        try:
            message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        except OSError:
            message, fds = b"", []
        if message.startswith(SINK) and fds:
            size = int(message.removeprefix(SINK))
            targets.append(DropTarget(socket.socket(fileno=fds[0]), size))
        elif message == STREAM and fds:
            targets.append(StreamDrain(fds[0]))
        elif message.startswith(FOLDER):
            folder = os.fsdecode(message.removeprefix(FOLDER))
        else:
            # Nothing was begun: there is nothing to protect.
            os._exit(0)
    guardian = Guardian(options.qmp, options.qmp_share, options.run, folder, targets, control)
    is_clean = not guardian.watch() or guardian.take_over()
    # At once: threads may still serve a client that has nothing left to say.
    os._exit(0 if is_clean else 1)


# A Python starts within a tenth of a second, on a loaded machine within some.
_START_S = 20.0
# What it needs to clean up is CLEAN_S and what comes before; then it goes on alone.
_TAKE_OVER_S = 60.0


class SinkSocket(NamedTuple):
    """A listening socket at `path` for a disk of so many bytes."""

    listener: socket.socket
    path: str
    size_bytes: int


def monitor_arguments(address: Address, *, share: bool) -> list[str]:
    """Return the options that name QEMU's monitor to a guardian, which works in another folder."""
    return ["--qmp", address.absolute, *(["--qmp-share"] if share else [])]


class GuardianClient:
    """A guardian process, started here, long before it is needed: it takes as long as all that comes
    before that. It does nothing, and ends with us, until `protect`.
    """

    def __init__(self, monitor: Sequence[str], run: str) -> None:
        """`monitor`: QEMU's, from monitor_arguments."""
        self._socket, self._process = start_outliving(
            "vmapipe.control.qemu.guardian", [*monitor, "--run", run], (), socket.SOCK_SEQPACKET
        )
        self._socket.settimeout(_START_S)
        #: It answers for QEMU.
        self.protects = False

    def protect(
        self, folder: str, sinks: Sequence[SinkSocket], stream_fd: int | None = None
    ) -> None:
        """Let it answer for these from now on, and wait until it does.

        `stream_fd`: what the machine's memory is read from; None: it is not saved. Raises Failure: no
        backup without one.
        """
        self.protects = True
        try:
            for sink in sinks:
                word = SINK + str(sink.size_bytes).encode()
                socket.send_fds(self._socket, [word], [sink.listener.fileno()])
            if stream_fd is not None:
                socket.send_fds(self._socket, [STREAM], [stream_fd])
            self._socket.send(FOLDER + os.fsencode(folder))
            is_ready = self._socket.recv(MAX_MESSAGE_BYTES) == READY
        except OSError:
            is_ready = False
        if not is_ready:
            self.kill()
            raise Failure("the guardian, which protects the guest's writes, does not start")

    def kill(self) -> None:
        """End it: there is nothing to protect."""
        self.protects = False
        self._process.kill()
        self._process.wait()
        self._socket.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def watch(self, index: int, pid: int) -> None:
        """Register the producer of this sink, which must not have been reaped."""
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(self._socket, [WATCH + str(index).encode()], [pidfd])
        except OSError as error:
            raise Failure("the guardian, which protects the guest's writes, was killed") from error
        finally:
            os.close(pidfd)

    def dismiss(self) -> None:
        """Let it exit: QEMU is clean."""
        self._end(BYE)

    def take_over(self) -> bool:
        """Let it end what is left in QEMU; False: it is not done yet."""
        return self._end(TAKE_OVER)

    def _end(self, word: bytes) -> bool:
        with contextlib.suppress(OSError):
            self._socket.send(word)
        self._socket.close()
        try:
            return self._process.wait(_TAKE_OVER_S) == 0
        except subprocess.TimeoutExpired:
            return False


if __name__ == "__main__":
    sys.exit(main())

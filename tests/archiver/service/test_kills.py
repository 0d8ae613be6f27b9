# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of each process of a job at a service, in every state of the dialogue.

The coordinator is the test itself, so that it hears every word; the producers,
the service's front process and the job's archiver are real.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zmq

from tests.archiver.service.peer import JOB, Peer
from tests.archiver.service.serving import make_keys, serving
from tests.machine import end_of, eventually, good, make_disk, started
from tests.network.cable import cable_to
from tests.network.place import until
from vmapipe.protocol.transfer_state import ArchiverState

LOST = "device 'a': the connection was lost for 2 s"
KILLED = "the archiver of 'vm.vma' was killed by SIGKILL"
REFUSED = "cannot be reached within 1 s: Connection refused; is an archiver running there?"
SILENT = "its coordinator has been silent for 5 s"
ENDED = "refused 'a': the job is ended [unknown-job]"
MISSING = "the producer of device '{}' did not come within 10 s"


class End(NamedTuple):
    """How the producer of `a` ends (its last words), and the job (what the service logs).

    None: that one was killed. `stored`: the archive is there.
    """

    producer: str | None
    job: str | None
    stored: bool = False


# (the state of the session as its archiver sees it, who is killed)
EXPECTED: dict[tuple[ArchiverState, str], End] = {
    (ArchiverState.GREETING, "producer"): End(None, MISSING.format("a")),
    (ArchiverState.GREETING, "archiver"): End(ENDED, KILLED),
    (ArchiverState.GREETING, "front"): End(REFUSED, None),
    (ArchiverState.GREETING, "coordinator"): End(ENDED, SILENT),
    (ArchiverState.WAITING, "producer"): End(None, MISSING.format("b")),
    (ArchiverState.WAITING, "archiver"): End(f"the job was ended: {KILLED}", KILLED),
    (ArchiverState.WAITING, "front"): End(REFUSED, None),
    (ArchiverState.WAITING, "coordinator"): End(f"the job was ended: {SILENT}", SILENT),
    (ArchiverState.RECEIVING, "producer"): End(None, LOST),
    (ArchiverState.RECEIVING, "archiver"): End(f"the job was ended: {KILLED}", KILLED),
    (ArchiverState.RECEIVING, "front"): End(LOST, None),
    (ArchiverState.RECEIVING, "coordinator"): End(f"the job was ended: {SILENT}", SILENT),
    (ArchiverState.ENDED, "producer"): End(None, LOST),
    (ArchiverState.ENDED, "archiver"): End(f"the job was ended: {KILLED}", KILLED),
    (ArchiverState.ENDED, "front"): End(LOST, None),
    (ArchiverState.ENDED, "coordinator"): End(f"the job was ended: {SILENT}", SILENT),
    # All is stored, and nobody can tell the producer so.
    (ArchiverState.DONE_SENT, "producer"): End(None, "", stored=True),
    (ArchiverState.DONE_SENT, "archiver"): End(LOST, "", stored=True),
    (ArchiverState.DONE_SENT, "front"): End(LOST, None, stored=True),
    (ArchiverState.DONE_SENT, "coordinator"): End(LOST, "", stored=True),
}
VICTIMS = ("producer", "archiver", "front", "coordinator")
# The others of these states tell little more; `make soak` has them.
QUICK = {(ArchiverState.RECEIVING, victim) for victim in VICTIMS}


def test_every_state_and_process_is_here() -> None:
    states = set(ArchiverState) - {ArchiverState.CLOSED}
    assert set(EXPECTED) == {(state, victim) for state in states for victim in VICTIMS}


class Scene:
    """A job at a service, whose producer `a` comes over a cable, held in one state."""

    def __init__(self, folder: Path, stack: ExitStack, state: ArchiverState, victim: str) -> None:
        self._stack = stack
        self._server, clients = make_keys(folder, "host1")
        self._client = clients["host1"]
        # The limit that a case is about is the first to be reached.
        missing = victim == "producer" and state in (ArchiverState.GREETING, ArchiverState.WAITING)
        started_by, silent_by = "10" if missing else "60", "5" if victim == "coordinator" else "60"
        words = ["--heartbeat", "1", "--reconnect-limit", "2", "--start-timeout", started_by]
        words += ["--client-timeout", silent_by]
        keys = (self._server, self._client)
        self.served = stack.enter_context(serving(folder / "store", *words, keys=keys))
        self.disk = make_disk(folder / "disk.raw", "A" * 64)
        self.cable = stack.enter_context(cable_to(self.served.endpoint))
        context: zmq.Context[Any] = zmq.Context()
        stack.callback(context.term)
        self.coordinator = Peer(context, self.served, self._client)
        stack.callback(self.coordinator.socket.close)
        two = state in (ArchiverState.WAITING, ArchiverState.ENDED)
        self.coordinator.open("vm.vma", devices=["a", "b"] if two else ["a"])
        self.coordinator.hear("OPENED")
        (self.archiver,) = self.served.archivers()
        getattr(self, f"_{state.value}")()

    def _start(self, name: str, endpoint: str, *more: str) -> subprocess.Popen[bytes]:
        words = ("producer", "--archiver", endpoint, "--keys", self._client, "--job", JOB.hex())
        named = ("--disk", self.disk, "--name", name, "--connect-timeout", "1")
        return self._stack.enter_context(started(*words, *named, *more))

    def _greeting(self) -> None:
        self.cable.cut = True
        self.producer = self._start("a", self.cable.endpoint)
        assert self.producer.stderr is not None
        assert b"reading" in self.producer.stderr.readline()

    def _waiting(self) -> None:
        self.producer = self._start("a", self.cable.endpoint)
        self._until_quiet(900)  # CURVE's handshake has 868 bytes; the rest is HELLO

    def _receiving(self) -> None:
        self.producer = self._start("a", self.cable.endpoint, "--speed", "256K")
        self._until_carried(1 << 19)

    def _ended(self) -> None:
        """The other device goes on."""
        self.producer = self._start("a", self.cable.endpoint)
        self._start("b", self.served.endpoint, "--speed", "64K")
        self._until_quiet(64 * 65536)

    def _told(self) -> None:
        self.cable.bytes_s = 4 << 20
        self.producer = self._start("a", self.cable.endpoint)
        self._until_carried(1 << 20)
        self.cable.bytes_s, self.cable.backwards = 0.0, False
        self.coordinator.hear("STORED")

    def _until_carried(self, least_bytes: int) -> None:
        def reached() -> bool:
            self.coordinator.say("BEAT", job=JOB)
            return self.cable.carried_bytes > least_bytes

        until(reached, self.producer)

    def _until_quiet(self, least_bytes: int) -> None:
        """All that was to be said has been, but for heartbeats."""
        self._until_carried(least_bytes)
        before = -1
        while self.cable.carried_bytes > before + 1000:
            before = self.cable.carried_bytes
            time.sleep(0.2)

    def kill(self, victim: str) -> None:
        match victim:
            case "producer":
                self.producer.kill()
            case "archiver":
                self.archiver.kill()
            case "front":
                self.served.process.kill()
                # As its host does: whoever is connected hears of it, whoever comes is refused.
                self.cable.close()
            case "coordinator":
                self.coordinator.socket.close()


@pytest.fixture
def scene(tmp_path: Path, state: ArchiverState, victim: str) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path, stack, state, victim)


@pytest.mark.parametrize(
    ("state", "victim"),
    [
        pytest.param(
            *case,
            marks=() if case in QUICK else pytest.mark.slow,
            id=f"{case[0].value}-{case[1]}",
        )
        for case in EXPECTED
    ],
)
def test_everybody_else_ends_with_the_right_words(
    scene: Scene, state: ArchiverState, victim: str
) -> None:
    end = EXPECTED[state, victim]
    scene.kill(victim)
    if end.job is not None:
        ended = scene.served.next_event("job-stored" if end.stored else "job-failed")
        assert end.job in ended.get("text", "")
        if not end.stored and victim != "coordinator":
            # The coordinator hears the same.
            assert end.job in hear_failed(scene.coordinator)
    if end.producer is not None:
        scene.cable.cut = False
        code, text = end_of(scene.producer)
        last = text.splitlines()[-1]
        assert (code, last.endswith(end.producer)) == (1, True), last
    assert eventually(
        lambda: not scene.archiver.is_running() or scene.archiver.status() == "zombie"
    )
    whole = {"vm.vma", "vm.vma.manifest.json"}
    assert scene.served.stored() == (whole if end.stored else set())
    if end.stored:
        good("verify", "--quiet", "--require-manifest", scene.served.folder / "vm.vma")


def hear_failed(coordinator: Peer) -> str:
    while True:
        name, fields = coordinator.next()
        if name == "FAILED":
            return str(fields["reason"])
        assert name != "STORED"

# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of either process in every state of the dialogue: the other one ends, and says why."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machine import end_of, good, make_disk, started
from tests.network.cable import Cable, cable_to
from tests.network.place import Place, until
from vmapipe.protocol.transfer_state import ArchiverState

LOST = "device 'a': the connection was lost for 2 s"
REFUSED = "cannot be reached within 1 s: Connection refused; is an archiver running there?"

# (the state of the session as the archiver sees it, who is killed): the exit code
# and the end of the last words of the other one, and whether the archive is there.
EXPECTED: dict[tuple[ArchiverState, str], tuple[int, str, bool]] = {
    (ArchiverState.GREETING, "producer"): (1, "1 of 1 producers did not come within 1 s", False),
    (ArchiverState.GREETING, "archiver"): (1, REFUSED, False),
    (ArchiverState.WAITING, "producer"): (1, "1 of 2 producers did not come within 10 s", False),
    (ArchiverState.WAITING, "archiver"): (1, REFUSED, False),
    (ArchiverState.RECEIVING, "producer"): (1, LOST, False),
    (ArchiverState.RECEIVING, "archiver"): (1, LOST, False),
    (ArchiverState.ENDED, "producer"): (1, LOST, False),
    (ArchiverState.ENDED, "archiver"): (1, LOST, False),
    # All is stored, and nobody can tell the producer so.
    (ArchiverState.DONE_SENT, "producer"): (0, f"{LOST}, after all was stored", True),
    (ArchiverState.DONE_SENT, "archiver"): (1, LOST, True),
}


def test_every_state_is_here() -> None:
    states = set(ArchiverState) - {ArchiverState.CLOSED}
    assert set(EXPECTED) == {(state, who) for state in states for who in ("producer", "archiver")}


class Scene:
    """A session of the device `a`, over a cable, held in the state that a test asks for."""

    def __init__(self, folder: Path, stack: ExitStack, state: ArchiverState, victim: str) -> None:
        self._stack = stack
        two = state in (ArchiverState.WAITING, ArchiverState.ENDED)
        # Only where it is to be reached is it short; and `a` has to come in time even then.
        limits = {
            (ArchiverState.GREETING, "producer"): "1",
            (ArchiverState.WAITING, "producer"): "10",
        }
        start_by = limits.get((state, victim), "90")
        words = ("--heartbeat", "1", "--reconnect-limit", "2", "--start-timeout", start_by)
        self.place = Place(folder, stack, *words, "--expect", "2" if two else "1")
        make_disk(self.place.disk, "A" * 64)
        self.cable = stack.enter_context(cable_to(self.place.endpoint))
        getattr(self, f"_{state.value}")()

    def _start(self, name: str, cable: Cable | None, *more: str) -> subprocess.Popen[bytes]:
        at = cable.endpoint if cable else ""
        words = self.place.producer(
            self.place.client, "--name", name, "--connect-timeout", "1", *more, at=at
        )
        return self._stack.enter_context(started(*words))

    def _greeting(self) -> None:
        self.cable.cut = True
        self.producer = self._start("a", self.cable)
        assert self.producer.stderr is not None
        assert b"reading" in self.producer.stderr.readline()

    def _waiting(self) -> None:
        self.producer = self._start("a", self.cable)
        # CURVE's handshake has 868 bytes; the rest is HELLO.
        until(lambda: self.cable.carried_bytes > 900, self.producer)
        # A heartbeat behind it is answered: so HELLO has come. A connection's end could still lose it.
        before = self.cable.answered_bytes
        until(lambda: self.cable.answered_bytes > before, self.producer)

    def _receiving(self) -> None:
        self.cable.bytes_s = 1 << 20
        self.producer = self._start("a", self.cable)
        until(lambda: self.cable.carried_bytes > 1 << 19, self.producer)

    def _ended(self) -> None:
        """The other device goes on."""
        self.producer = self._start("a", self.cable)
        self._start("b", None, "--speed", "64K")
        self._until_quiet(64 * 65536)

    def _told(self) -> None:
        # All of it takes four seconds: the way back is closed long before.
        self.cable.bytes_s = 1 << 20
        self.producer = self._start("a", self.cable)
        until(lambda: self.cable.carried_bytes > 1 << 18, self.producer)
        self.cable.bytes_s, self.cable.backwards = 0.0, False
        self.place.line("stored")

    def _until_quiet(self, least_bytes: int) -> None:
        """All that was to be said has been, but for heartbeats."""
        until(lambda: self.cable.carried_bytes > least_bytes, self.producer)
        before = -1
        while self.cable.carried_bytes > before + 1000:
            before = self.cable.carried_bytes
            time.sleep(0.2)


@pytest.fixture
def scene(tmp_path: Path, state: ArchiverState, victim: str) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path, stack, state, victim)


@pytest.mark.parametrize(
    ("state", "victim"), EXPECTED, ids=[f"{state.value}-{victim}" for state, victim in EXPECTED]
)
def test_the_other_one_ends_with_the_right_words(
    scene: Scene, state: ArchiverState, victim: str
) -> None:
    code, words, is_stored = EXPECTED[state, victim]
    if victim == "producer":
        scene.producer.kill()
        left = scene.place.archiver
    else:
        scene.place.archiver.kill()
        # As its host does: whoever is connected hears of it, whoever comes is refused.
        scene.cable.close()
        left = scene.producer
    ended = end_of(left)
    last = ended[1].splitlines()[-1]
    assert (ended[0], last.endswith(words)) == (code, True), last
    assert scene.place.archive.exists() == is_stored
    if is_stored:
        good("verify", scene.place.archive)

# SPDX-License-Identifier: Apache-2.0
"""What a hostile service says to a client: it cannot write on the terminal, nor be believed everything."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tests.machine import LIMIT_S, VMAPIPE, make_disk
from vmapipe.control.coordinator.remote_archiver import RemoteJob
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.protocol import limits
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import ignore

ESCAPES = "x\x1b]0;pwned\x07\x1b[31m\nroot@host:~# "
UUID = b"u" * 16
SIZES = [65536]


def word(kind: str, /, **fields: object) -> bytes:
    return bytes(msgpack.packb([kind, fields]))


OPENED = word("OPENED", version=1, heartbeat_s=60)
BEGUN = word("BEGUN", uuid=UUID, sizes=SIZES)
STORED = word("STORED", archive=ESCAPES, uuid=UUID, stored=1, plain=1)
FAILED = word("FAILED", reason=ESCAPES)
WELCOME = word(
    "WELCOME",
    version=1,
    dev_id=1,
    credit=8 << 20,
    frame_bytes=1 << 20,
    heartbeat_s=60,
    shared=False,
    reconnect_s=0,
    scattered=False,
)


OPENED_SHORT = word("OPENED", version=1, heartbeat_s=1)
PROGRESS = word("PROGRESS", stored=1, plain=1, done=[1], zero=[0])


class Hostile(threading.Thread):
    """Answers each word by its kind; what it answers to END goes to the coordinator, too."""

    def __init__(self, answers: dict[str, list[bytes]]) -> None:
        super().__init__()
        self._endless: tuple[str, list[bytes]] = ("", [])
        self._answers = {"BEAT": [word("ALIVE")], "PING": [word("PONG")], **answers}
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.sndhwm = 0
        self.port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self._halt, theirs = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        theirs.bind("inproc://stop")
        self._halt.connect("inproc://stop")
        self._halted = theirs

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._halted, zmq.POLLIN)
        coordinator = b""
        while self._halted not in dict(poller.poll()):
            peer, *parts = self._router.recv_multipart()
            if len(parts) != 1:
                continue
            kind = msgpack.unpackb(parts[0])[0]
            coordinator = peer if kind == "OPEN" else coordinator
            if kind == self._endless[0]:
                self._router.send_multipart([peer, *self._endless[1]])
            for answer in self._answers.get(kind, []):
                self._router.send_multipart([peer, answer])
            for answer in self._answers.get(f"{kind}, to the coordinator", []):
                self._router.send_multipart([coordinator, answer])
        self._router.close()
        self._halted.close()

    def says_without_end(self, kind: str, parts: list[bytes]) -> None:
        """Answer to `kind` with one message of so many parts."""
        self._endless = (kind, parts)

    def close(self) -> None:
        self._halt.send(b"")
        self.join(LIMIT_S)
        self._halt.close()
        self._context.term()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "d.raw", "A")


@contextlib.contextmanager
def hostile(answers: dict[str, list[bytes]]) -> Iterator[Hostile]:
    service = Hostile(answers)
    service.start()
    try:
        yield service
    finally:
        service.close()


def backup(service: Hostile, disk: Path, *more: str) -> tuple[int, str]:
    words = ("--archiver", f"tcp://127.0.0.1:{service.port}", "--insecure-plain-tcp", *more)
    done = subprocess.run(
        [*VMAPIPE, "backup", *words, "--disk", f"a={disk}", "x.vma"],
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    text = (done.stdout + done.stderr).decode()
    assert "Traceback" not in text
    # Not one byte that a terminal would obey.
    assert all(char.isprintable() or char == "\n" for char in text)
    return done.returncode, text


def conduct(service: Hostile, **more: float) -> None:
    """Watch a job as the coordinator's process for that does."""
    at = f"tcp://127.0.0.1:{service.port}"
    options = argparse.Namespace(archiver=at, job=UUID, device=["a"], base=None, output="x.vma")
    cancel = Cancel()
    link = ArchiverConnection(at)
    try:
        RemoteJob(options, link, cancel, ignore, **more).run([word("OPEN")])
    finally:
        link.close()
        cancel.close()


@pytest.mark.parametrize(
    "said",
    [
        [STORED],
        [BEGUN, STORED],
        [word("PROGRESS", stored=1, plain=1, done=[1], zero=[0])],
        [OPENED, STORED],
        [OPENED, BEGUN, STORED],
        [OPENED, BEGUN, *[word("NOTICE", text="n")] * 2000, STORED],
        [b"\xc1junk"],
        [b"\x91" * 60_000],
        [word("OPENED", version=1, heartbeat_s=0)],
    ],
    ids=[
        "stored",
        "begun",
        "progress",
        "opened, stored",
        "stored at once",
        "stored behind notices",
        "junk",
        "deep",
        "no heartbeat",
    ],
)
def test_what_comes_in_the_wrong_order_or_shape_ends_the_backup_with_a_line(
    disk: Path, said: list[bytes]
) -> None:
    with hostile({"OPEN": said}) as service:
        code, text = backup(service, disk)
    assert code == 1
    assert "this is not a vmapipe archiver" in text.splitlines()[-1]


def test_an_archive_is_called_as_the_client_has_called_it(disk: Path) -> None:
    answers = {
        "OPEN": [OPENED, BEGUN],
        "HELLO": [WELCOME],
        "END": [word("DONE", uuid=UUID)],
        "END, to the coordinator": [STORED],
    }
    with hostile(answers) as plain:
        code, text = backup(plain, disk)
        assert code == 0, text
        assert f"stored tcp://127.0.0.1:{plain.port}/x.vma:" in text
        assert "pwned" not in text


@pytest.mark.parametrize("answer", [word("DONE", uuid=UUID), word("ABORT", reason="no")])
def test_a_job_that_is_stored_before_all_was_sent_is_not_believed(
    disk: Path, answer: bytes
) -> None:
    """Also where the producer fails or ends before anybody looks."""
    answers = {
        "OPEN": [OPENED, BEGUN],
        "HELLO": [WELCOME, answer],
        "HELLO, to the coordinator": [STORED],
    }
    with hostile(answers) as service:
        code, text = backup(service, disk)
    assert code == 1, text


@pytest.mark.parametrize("kind", ["NOTICE", "PROGRESS"])
def test_a_service_that_only_lives_is_given_up(kind: str) -> None:
    said = {"NOTICE": word("NOTICE", text="soon"), "PROGRESS": PROGRESS}[kind]
    with (
        hostile({"OPEN": [OPENED_SHORT, BEGUN], "BEAT": [word("ALIVE"), said]}) as service,
        pytest.raises(Failure, match="answers, but has stored nothing for 2 s"),
    ):
        conduct(service, idle_s=2.0)


def test_a_service_that_answers_everything_but_the_question_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "GREETING_HEARTBEAT_S", 1)
    with (
        hostile({"OPEN": [word("NOTICE", text="soon"), word("ALIVE")]}) as service,
        pytest.raises(Failure, match="no answer within 1 s"),
    ):
        conduct(service)


def test_notices_that_never_end_are_a_fault() -> None:
    flood = [word("NOTICE", text="n")] * 100_000
    with (
        hostile({"OPEN": [OPENED, *flood]}) as service,
        pytest.raises(Failure, match="its notices have no end"),
    ):
        conduct(service)


@pytest.mark.parametrize(
    "said",
    [
        [word("REFUSE", code=ESCAPES, reason=ESCAPES)],
        [OPENED, word("NOTICE", text=ESCAPES), FAILED],
        [OPENED, BEGUN, FAILED],
    ],
)
def test_words_of_a_service_cannot_move_the_cursor(disk: Path, said: list[bytes]) -> None:
    with hostile({"OPEN": said}) as service:
        code, text = backup(service, disk)
    assert code == 1
    assert "pwned" in text or "not a vmapipe archiver" in text


def test_notices_without_end_come_to_an_end(disk: Path) -> None:
    flood = [word("NOTICE", text="n" * 4000)] * 5000
    with hostile({"OPEN": [OPENED, *flood, word("FAILED", reason="enough")]}) as service:
        code, text = backup(service, disk)
    assert code == 1
    assert len(text) < 1_200_000
    assert "more notices are left out" in text
    assert "enough" in text.splitlines()[-1]


def test_a_message_whose_parts_have_no_end_is_left(disk: Path) -> None:
    parts = [b"z" * 60_000] * 3000
    with hostile({"OPEN": []}) as service:
        service.says_without_end("OPEN", parts)
        code, text = backup(service, disk)
    assert code == 1
    assert "its messages have no end" in text.splitlines()[-1]

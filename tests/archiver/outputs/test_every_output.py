# SPDX-License-Identifier: Apache-2.0
"""What holds for every output, whatever it is."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.archiver.outputs.targets import (
    BLOCKING_KINDS,
    KINDS,
    LIMIT_S,
    ReaderTarget,
    Target,
    in_thread,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure


@functools.cache
def random_data() -> bytes:
    return random.Random(7).randbytes(3 << 20)


# More than any pipe or socket holds.
TOO_MUCH = bytes(64 << 20)


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return KINDS[request.param](tmp_path)


@pytest.fixture(params=BLOCKING_KINDS)
def slow_target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return KINDS[request.param](tmp_path)


def test_what_is_written_arrives_whole_and_in_order(target: Target) -> None:
    output = target.open()
    output.write([b"begin", b"", memoryview(random_data())[1:]])
    output.write([])
    output.write([b"end"])
    output.commit()
    assert target.received() == b"begin" + random_data()[1:] + b"end"


def test_any_number_of_buffers_goes_in_one_write(target: Target) -> None:
    # More than the kernel takes in one call (1024), of all lengths.
    pieces = [random_data()[i * 97 : i * 97 + i % 700] for i in range(5000)]
    output = target.open()
    output.write(pieces)
    output.commit()
    assert target.received() == b"".join(pieces)


def test_the_buffers_may_be_used_again_when_a_write_returns(target: Target) -> None:
    output = target.open()
    buffer = bytearray(1 << 20)
    for letter in b"abcdef":
        buffer[:] = bytes([letter]) * len(buffer)
        output.write([memoryview(buffer)])
    output.commit()
    assert target.received() == b"".join(bytes([letter]) * (1 << 20) for letter in b"abcdef")


def test_an_empty_archive_can_be_committed(target: Target) -> None:
    target.open().commit()
    assert target.received() == b""


def test_the_bytes_that_have_left_are_counted(target: Target) -> None:
    output = target.open()
    assert output.written_bytes == 0
    output.write([random_data()])
    output.write([random_data()])
    output.commit()
    received = len(target.received())
    assert received == 2 * len(random_data())
    # Random data does not get shorter; compressed, it has some bytes more.
    assert 0 <= output.written_bytes - received < 1000


def test_an_abandoned_archive_leaves_nothing(target: Target) -> None:
    output = target.open()
    output.write([random_data()])
    output.abandon()
    assert target.left() == b""


def test_abandoning_at_once_and_twice_is_no_error(target: Target) -> None:
    output = target.open()
    output.abandon()
    output.abandon()
    assert target.left() == b""


def test_abandoning_after_the_commit_does_nothing(target: Target) -> None:
    output = target.open()
    output.write([random_data()])
    output.commit()
    output.abandon()
    output.abandon()
    assert target.received() == random_data()


@pytest.mark.parametrize("end", ["commit", "abandon"])
@pytest.mark.parametrize("more", ["write", "commit"])
def test_after_its_end_an_output_takes_no_more(target: Target, end: str, more: str) -> None:
    output = target.open()
    ends = {"commit": output.commit, "abandon": output.abandon}
    mores: dict[str, Callable[[], None]] = {
        "commit": output.commit,
        "write": lambda: output.write([b"more"]),
    }
    ends[end]()
    with pytest.raises(Failure, match="takes no more"):
        mores[more]()
    assert (target.received() if end == "commit" else target.left()) == b""


def test_a_description_says_where_the_archive_goes(target: Target) -> None:
    output = target.open()
    assert output.description
    output.abandon()
    target.left()


def test_a_write_that_waits_for_its_reader_ends_when_the_archive_is_abandoned(
    slow_target: Target, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So long a busy machine does not take for a write that ends: the two are told apart.
    monkeypatch.setattr("vmapipe.archiver.outputs.base.ABANDON_WAIT_S", 2 * LIMIT_S)
    output = slow_target.open(asleep=True)
    with in_thread(lambda: output.write([TOO_MUCH])) as errors:
        assert stuck.wait(LIMIT_S)
        started = time.monotonic()
        output.abandon()
        assert time.monotonic() - started < LIMIT_S
    assert len(errors) == 1
    assert isinstance(errors[0], Failure)
    slow_target.left()


def test_a_write_that_waits_for_its_reader_ends_when_the_process_is_to_stop(
    slow_target: Target, stuck: threading.Event
) -> None:
    cancel = Cancel()
    output = slow_target.open(asleep=True, cancel=cancel)
    with in_thread(lambda: output.write([TOO_MUCH])) as errors:
        assert stuck.wait(LIMIT_S)
        cancel.ask("cancelled by a test")
    assert [str(error) for error in errors] == ["cancelled by a test"]
    assert isinstance(errors[0], Cancelled)
    output.abandon()
    slow_target.left()
    cancel.close()


@pytest.mark.parametrize("kind", [kind for kind in BLOCKING_KINDS if kind != "command"])
def test_a_reader_that_was_asleep_gets_everything(
    kind: str, tmp_path: Path, stuck: threading.Event
) -> None:
    slow_target = KINDS[kind](tmp_path)
    assert isinstance(slow_target, ReaderTarget)
    output = slow_target.open(asleep=True)
    with in_thread(lambda: output.write([random_data()])) as errors:
        assert stuck.wait(LIMIT_S)
        slow_target.wake()
    output.commit()
    assert errors == []
    assert slow_target.received() == random_data()

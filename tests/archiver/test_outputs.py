# SPDX-License-Identifier: Apache-2.0
"""What holds for every output, whatever it is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.archiver.targets import BLOCKING_KINDS, KINDS, LIMIT_S, Target, in_thread
from vmapipe.archiver.outputs.descriptor import ABANDON_WAIT_S
from vmapipe.archiver.outputs.output import Output
from vmapipe.runtime.errors import Failure

CHANCE = random.Random(7)
RANDOM = CHANCE.randbytes(3 << 20)
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
    output.write([b"begin", b"", memoryview(RANDOM)[1:]])
    output.write([])
    output.write([b"end"])
    output.commit()
    assert target.received() == b"begin" + RANDOM[1:] + b"end"


def test_any_number_of_buffers_goes_in_one_write(target: Target) -> None:
    # More than the kernel takes in one call (1024), of all lengths.
    pieces = [RANDOM[i * 97 : i * 97 + i % 700] for i in range(5000)]
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
    output.write([RANDOM])
    output.write([RANDOM])
    output.commit()
    received = len(target.received())
    assert received == 2 * len(RANDOM)
    # Random data does not get shorter; compressed, it has some bytes more.
    assert 0 <= output.written_bytes - received < 200


def test_an_abandoned_archive_leaves_nothing(target: Target) -> None:
    output = target.open()
    output.write([RANDOM])
    output.abandon()
    assert target.left() == b""


def test_abandoning_at_once_and_twice_is_no_error(target: Target) -> None:
    output = target.open()
    output.abandon()
    output.abandon()
    assert target.left() == b""


def test_abandoning_after_the_commit_does_nothing(target: Target) -> None:
    output = target.open()
    output.write([RANDOM])
    output.commit()
    output.abandon()
    output.abandon()
    assert target.received() == RANDOM


@pytest.mark.parametrize("end", [Output.commit, Output.abandon])
@pytest.mark.parametrize("more", [lambda o: o.write([TOO_MUCH]), lambda o: o.commit()])
def test_after_its_end_an_output_refuses_more(
    target: Target, end: Callable[[Output], None], more: Callable[[Output], None]
) -> None:
    output = target.open()
    end_of = output.commit if end is Output.commit else output.abandon
    end_of()
    with pytest.raises((Failure, RuntimeError)):
        more(output)
    target.received() if end is Output.commit else target.left()


def test_a_description_says_where_the_archive_goes(target: Target) -> None:
    output = target.open()
    assert output.description
    output.abandon()
    target.left()


def test_a_write_that_waits_for_a_reader_ends_when_the_archive_is_abandoned(
    slow_target: Target,
) -> None:
    output = slow_target.open(asleep=True)
    with in_thread(lambda: output.write([TOO_MUCH])) as errors:
        _wait_until_stuck(output)
        started = time.monotonic()
        output.abandon()
        assert time.monotonic() - started < ABANDON_WAIT_S
    assert [type(error).__mro__[-4] for error in errors] == [Failure]
    slow_target.left()


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    target = KINDS["pipe"](tmp_path)
    output = target.open(asleep=True)
    with in_thread(lambda: output.write([RANDOM])):
        _wait_until_stuck(output)
        target.reader.start()  # type: ignore[attr-defined]
    output.commit()
    assert target.received() == RANDOM


def _wait_until_stuck(output: Output) -> None:
    """Until something was written, and then nothing more."""
    deadline = time.monotonic() + LIMIT_S
    before = -1
    while output.written_bytes != before or not before:
        assert time.monotonic() < deadline, "nothing was written"
        before = output.written_bytes
        time.sleep(0.05)

# SPDX-License-Identifier: Apache-2.0
"""The messages between a guard and the processes of a backup: they come back as they were, or are refused."""

from __future__ import annotations

import pytest

from tests.producer.guard.hammer import JOB
from vmapipe.clusters.sizes import MAX_CLUSTERS
from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.protocol.guard import (
    Claimed,
    FromGuard,
    GuardAttach,
    GuardCopied,
    GuardFailed,
    Hold,
    Saved,
    decode_for_guard,
    decode_from_guard,
    encode,
)


@pytest.mark.parametrize(
    "message",
    [
        GuardAttach(limits.VERSION, JOB, "d", 0, 1, 0, 1),
        Hold(limits.VERSION, JOB, ("a", "b")),
        GuardCopied(7),
    ],
)
def test_messages_come_back_as_they_were(message: object) -> None:
    assert decode_for_guard(encode(message)) == message  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [Saved((3, 9), (1, 2)), GuardFailed("why"), Claimed(0, 0)])
def test_answers_come_back_as_they_were(message: FromGuard) -> None:
    assert decode_from_guard(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        GuardAttach(limits.VERSION + 1, JOB, "d", 0, 1, 0, 1),
        GuardAttach(limits.VERSION, b"short", "d", 0, 1, 0, 1),
        GuardAttach(limits.VERSION, JOB, "d", 0, 0, 0, 1),
        GuardAttach(limits.VERSION, JOB, "d", 0, 1 << 40, 0, 1),
        Saved((1,), (0,)),
    ],
)
def test_messages_that_make_no_sense_are_refused(message: object) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_for_guard(encode(message))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        Saved((), ()),
        Saved((1, 2), (0,)),
        Saved((MAX_CLUSTERS,), (0,)),
        Saved(tuple(range(65)), tuple(range(65))),
        Saved((1,), (1 << 40,)),
    ],
)
def test_answers_that_make_no_sense_are_refused(message: FromGuard) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_from_guard(encode(message))

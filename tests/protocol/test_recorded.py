# SPDX-License-Identifier: Apache-2.0
"""Dialogues recorded with an earlier version: today's program says, and understands, the same bytes.

Each line of recorded/*.jsonl is one message: who sent it, and its parts in hex. They are of
a producer and an archiver of version 0.1.0 as it was before the modules were put together anew,
over TCP and, with shared memory, over a Unix socket. They are not to be recorded again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from vmapipe.protocol import transfer
from vmapipe.protocol.transfer import (
    Bye,
    Done,
    End,
    Grant,
    Hello,
    Message,
    RunFrame,
    SharedRun,
    Welcome,
)
from vmapipe.protocol.transfer_state import (
    ArchiverSide,
    ArchiverState,
    ProducerSide,
    ProducerState,
)

FOLDER = Path(__file__).parent / "recorded"


class Said(NamedTuple):
    sender: str
    parts: list[bytes]


def recorded(name: str) -> list[Said]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    said = [json.loads(line) for line in lines]
    return [Said(each["from"], [bytes.fromhex(part) for part in each["parts"]]) for each in said]


def said_again(side: ProducerSide, message: Message) -> list[bytes]:
    """The message, made by today's producer."""
    match message:
        case Hello():
            parts = side.hello()
        case RunFrame(_, _, first, count, masks, payload):
            parts = side.run(first, count, masks, payload)
        case SharedRun(_, _, first, count, masks, position, _):
            parts = side.shared_run(first, count, masks, position)
        case End():
            parts = side.end()
        case Bye():
            parts = side.bye()
        case _:
            raise AssertionError(f"{message} was not recorded")
    return [bytes(part) for part in parts]


def answered_again(side: ArchiverSide, message: Message) -> list[bytes]:
    """The message, made by today's archiver."""
    match message:
        case Welcome(_, dev_id, credit, frame_bytes, heartbeat_s, shared, reconnect_s):
            parts = side.welcome(
                dev_id, credit, frame_bytes, heartbeat_s, shared=shared, reconnect_s=reconnect_s
            )
        case Grant(limit, acked):
            granted = side.grant(limit, acked)
            assert granted is not None
            parts = granted
        case Done(uuid):
            parts = side.done(uuid)
        case _:
            raise AssertionError(f"{message} was not recorded")
    return [bytes(part) for part in parts]


@pytest.mark.parametrize(("name", "kind"), [("tcp.jsonl", RunFrame), ("ipc.jsonl", SharedRun)])
def test_a_dialogue_recorded_before_is_the_same_today(name: str, kind: type[Message]) -> None:
    said = recorded(name)
    hello = transfer.decode(said[0].parts)
    assert isinstance(hello, Hello)
    producer = ProducerSide(
        *(hello.job, hello.device, hello.size, hello.program, hello.shared, hello.session)
    )
    archiver = ArchiverSide()
    kinds = set()
    for sender, parts in said:
        message = transfer.decode(parts)
        kinds.add(type(message))
        if sender == "producer":
            assert said_again(producer, message) == parts
            assert archiver.receive(parts) == message
        else:
            answer = answered_again(archiver, message)
            # Today's WELCOME has more fields; those with their default were left out then.
            if answer != parts:
                assert isinstance(message, Welcome)
                assert transfer.decode(answer) == message
            assert producer.receive(parts) == message
    assert {Hello, Welcome, kind, Grant, End, Done} <= kinds
    assert producer.state is ProducerState.CLOSED
    assert archiver.state is ArchiverState.CLOSED

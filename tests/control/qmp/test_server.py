# SPDX-License-Identifier: Apache-2.0
"""The monitor's QMP: what any client of QEMU's may rely on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.qmp.server import MAX_LINE_BYTES, DeferredAnswer, QmpError, QmpServer


def refuse(arguments: dict[str, Any]) -> Any:
    raise QmpError(f"not with {sorted(arguments)}")


def server(*, negotiated: bool = True) -> QmpServer:
    made = QmpServer({"query-disks": lambda arguments: ["a"], "refuse": refuse}, "1.2.3")
    if negotiated:
        assert answers(made.feed(b'{"execute": "qmp_capabilities"}\n')) == [{"return": {}}]
    return made


def answers(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def test_it_greets_as_qemu_does() -> None:
    (greeting,) = answers(server(negotiated=False).greeting())
    assert greeting["QMP"]["version"]["qemu"] == {"major": 1, "minor": 2, "micro": 3}
    assert greeting["QMP"]["capabilities"] == []


def test_nothing_works_before_the_capabilities_are_negotiated() -> None:
    (answer,) = answers(server(negotiated=False).feed(b'{"execute": "query-disks"}\n'))
    assert answer["error"]["class"] == "CommandNotFound"
    assert "qmp_capabilities" in answer["error"]["desc"]


def test_the_id_comes_back_with_results_and_with_errors() -> None:
    qmp = server()
    assert answers(qmp.feed(b'{"execute": "query-disks", "id": {"any": 1}}\n')) == [
        {"return": ["a"], "id": {"any": 1}}
    ]
    (answer,) = answers(qmp.feed(b'{"execute": "refuse", "arguments": {"x": 1}, "id": 7}\n'))
    assert answer == {"error": {"class": "GenericError", "desc": "not with ['x']"}, "id": 7}


def test_every_command_is_listed() -> None:
    (answer,) = answers(server().feed(b'{"execute": "query-commands"}\n'))
    assert {"name": "query-disks"} in answer["return"]
    assert {"name": "qmp_capabilities"} in answer["return"]


def test_an_unknown_command_is_named() -> None:
    (answer,) = answers(server().feed(b'{"execute": "x-y"}\n'))
    assert answer["error"] == {
        "class": "CommandNotFound",
        "desc": "the command x-y has not been found",
    }


@given(cuts=st.lists(st.integers(0, 80), max_size=8))
def test_commands_may_be_cut_anywhere(cuts: list[int]) -> None:
    data = b'{"execute": "query-disks"}\r\n\r\n{"execute": "query-version", "id": 2}\n'
    qmp = server()
    at, out = 0, b""
    for cut in [*sorted(cuts), len(data)]:
        out += qmp.feed(data[at:cut])
        at = max(at, cut)
    first, second = answers(out)
    assert first == {"return": ["a"]}
    assert second["id"] == 2


@given(junk=st.binary(max_size=300))
def test_junk_is_answered_and_the_next_command_works(junk: bytes) -> None:
    qmp = server()
    for answer in answers(qmp.feed(junk.replace(b"\n", b" ") + b"\n")):
        assert answer["error"]["class"] in ("GenericError", "CommandNotFound")
    # What may still have become JSON is known to be none now.
    *late, answer = answers(qmp.feed(b'{"execute": "query-disks"}\n'))
    assert [error["error"]["desc"] for error in late] in ([], ["this is not valid JSON"])
    assert answer == {"return": ["a"]}


def test_a_command_needs_no_line_end_and_may_have_several() -> None:
    qmp = server()
    assert answers(qmp.feed(b'{"execute": "query-disks"}')) == [{"return": ["a"]}]
    pretty = b'{\n  "execute": "query-disks",\n  "id": "}{"\n}{"execute": "query-disks"}'
    assert answers(qmp.feed(pretty)) == [{"return": ["a"], "id": "}{"}, {"return": ["a"]}]


def test_members_that_a_command_does_not_have_are_refused() -> None:
    (answer,) = answers(server().feed(b'{"execute": "query-disks", "why": 1}\n'))
    assert answer["error"]["desc"] == "QMP input member 'why' is unexpected"


def test_what_follows_a_command_whose_answer_takes_time_waits_for_it() -> None:
    later = DeferredAnswer()
    qmp = QmpServer({"wait": lambda arguments: later, "ask": lambda arguments: 1}, "1")
    qmp.feed(b'{"execute": "qmp_capabilities"}')
    assert qmp.feed(b'{"execute": "wait", "id": 1}{"execute": "ask", "id": 2}') == b""
    assert qmp.go_on() == b""
    later.answer("done")
    later.answer("twice")
    assert answers(qmp.go_on()) == [{"return": "done", "id": 1}, {"return": 1, "id": 2}]


def test_a_client_whose_commands_wait_is_not_read_from_without_end() -> None:
    later = DeferredAnswer()
    qmp = QmpServer({"wait": lambda arguments: later}, "1")
    qmp.feed(b'{"execute": "qmp_capabilities"}{"execute": "wait"}')
    rounds = 0
    while qmp.takes_more:
        assert qmp.feed(b'{"execute": "query-version"}' * 100) == b""
        rounds += 1
    assert 1 < rounds < 1000
    later.refuse(QmpError("no"))
    assert len(answers(qmp.go_on())) > 100
    assert qmp.takes_more


def test_events_go_to_whoever_has_negotiated() -> None:
    assert server(negotiated=False).event("X", {}, 1.5) == b""
    (event,) = answers(server().event("X", {"a": 1}, 1.5))
    stamp = {"seconds": 1, "microseconds": 500_000}
    assert event == {"event": "X", "data": {"a": 1}, "timestamp": stamp}


def test_a_defect_in_a_command_ends_that_command_and_nothing_else() -> None:
    qmp = QmpServer({"broken": lambda arguments: arguments["absent"]}, "1")
    qmp.feed(b'{"execute": "qmp_capabilities"}')
    broken, good = answers(qmp.feed(b'{"execute": "broken"}{"execute": "query-version"}'))
    assert "a defect of vmapipe" in broken["error"]["desc"]
    assert "return" in good


def test_json_that_is_nested_too_deeply_is_no_command() -> None:
    (answer,) = answers(server().feed(b"[" * 50_000 + b"\n"))
    assert answer["error"]["class"] == "GenericError"


def test_a_line_without_an_end_ends_the_connection() -> None:
    qmp = server()
    assert qmp.feed(b"x" * (MAX_LINE_BYTES - 1)) == b""
    (answer,) = answers(qmp.feed(b"xx"))
    assert qmp.closed
    assert "too long" in answer["error"]["desc"]

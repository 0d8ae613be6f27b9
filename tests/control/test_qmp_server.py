# SPDX-License-Identifier: Apache-2.0
"""The monitor's QMP: what any client of QEMU's may rely on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.monitor.qmp import MAX_LINE_BYTES, QmpError, QmpServer


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
    assert answers(qmp.feed(b'{"execute": "query-disks"}\n')) == [{"return": ["a"]}]


def test_json_that_is_nested_too_deeply_is_no_command() -> None:
    (answer,) = answers(server().feed(b"[" * 50_000 + b"\n"))
    assert answer["error"]["class"] == "GenericError"


def test_a_line_without_an_end_ends_the_connection() -> None:
    qmp = server()
    assert qmp.feed(b"x" * (MAX_LINE_BYTES - 1)) == b""
    (answer,) = answers(qmp.feed(b"xx"))
    assert qmp.closed
    assert "too long" in answer["error"]["desc"]

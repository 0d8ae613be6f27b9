# SPDX-License-Identifier: Apache-2.0
"""Answers of any type and shape: what is called valid can be read by all who read it."""

from __future__ import annotations

import ast
import copy
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.qmp.answers import EVENT, GOOD, NOTE, READERS
from tests.control.qmp.hostile import DISK
from vmapipe.control.qemu import poweroff, vmstate_commands
from vmapipe.control.qemu.disks import DiskChoiceOptions, Machine, choose_disks
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qmp.answers import ANSWERS as SHAPES
from vmapipe.control.qmp.answers import answer_fault, event_fault
from vmapipe.runtime.errors import Failure

ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, 5, -1, 1.5, 1e300, True, "x", "", "a\0b", "x" * 2000, "\x1b[31m", "vmapipe-"),
        *((1 << 63) - 1, 1 << 63, [], {}, [5], [None], [[]], ["x"], {"a": 1}, [{"name": 5}]),
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a value, itself first."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def changed(value: Any, path: tuple[Any, ...], odd: Any, *, removed: bool) -> Any:
    if not path:
        return odd
    whole = copy.deepcopy(value)
    inner = whole
    for step in path[:-1]:
        inner = inner[step]
    if removed:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return whole


@pytest.mark.parametrize("command", GOOD)
def test_good_answers_are_valid(command: str) -> None:
    assert answer_fault(command, GOOD[command]) == ""
    READERS.get(command, len)(GOOD[command])


@pytest.mark.parametrize("command", GOOD)
@given(st.data())
def test_whatever_is_changed_in_an_answer_it_is_not_valid_or_can_be_read(
    command: str, data: st.DataObject
) -> None:
    answer = GOOD[command]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(answer))))
        answer = changed(answer, place, data.draw(ODD), removed=data.draw(st.booleans()))
        if not isinstance(answer, dict | list):
            break
    fault = answer_fault(command, answer)
    assert len(fault) < 300
    assert fault.isprintable()
    if not fault:
        READERS.get(command, lambda answer: None)(answer)


_NAMES = st.sampled_from(["a", "b", "c", "d"])
_NUMBERS = st.integers(0, 4)


@given(
    st.lists(st.tuples(_NAMES, st.sampled_from(["raw", "throttle", "backup-top", "qcow2"]))),
    st.lists(st.tuples(_NUMBERS, _NUMBERS, st.sampled_from(["file", "backing", "target"]))),
)
def test_a_graph_of_nodes_that_has_circles_is_read_to_its_end(
    drivers: list[tuple[str, str]], edges: list[tuple[int, int, str]]
) -> None:
    nodes = [
        {"node-name": name, "drv": drv, "image": {"virtual-size": 65536}} for name, drv in drivers
    ]
    known = [{"id": n, "type": "block-driver", "name": name} for n, name in enumerate("abcd")]
    known.append({"id": 4, "type": "block-job", "name": "j"})
    found = [{"parent": p, "child": c, "name": role} for p, c, role in edges]
    blocks = [{"device": "d", "inserted": node} for node in nodes]
    answer = {"nodes": known, "edges": found}
    assert answer_fault("x-debug-query-block-graph", answer) == ""
    graph = Graph(nodes, answer)
    for wanted in ([], ["a"], ["b"], ["d"]):
        try:
            choose_disks(Machine(blocks, nodes, [], graph), DiskChoiceOptions(wanted))
        except Failure:
            pass


@given(st.data())
def test_whatever_is_changed_in_an_event_its_name_is_a_text_if_it_is_valid(
    data: st.DataObject,
) -> None:
    place = data.draw(st.sampled_from(list(places(EVENT))[1:]))
    event = changed(EVENT, place, data.draw(ODD), removed=data.draw(st.booleans()))
    if not event_fault(event):
        assert isinstance(event["event"], str)
        stamp = event.get("timestamp", {})
        assert isinstance(stamp.get("seconds", 0), int)


def test_the_place_of_what_is_wrong_is_told() -> None:
    chance = random.Random(1)
    for command, answer in GOOD.items():
        place = chance.choice(list(places(answer))[1:] or [("it",)])
        if place == ("it",):
            assert answer_fault(command, 5) == "it is not a string"
            continue
        fault = answer_fault(command, changed(answer, place, object(), removed=False))
        assert not fault or str(place[0]) in fault or f"[{place[0]}]" in fault
    image = {"virtual-size": "big"}
    wrong = [DISK, {"device": "d", "inserted": {"image": image}}]
    fault = answer_fault("query-block", wrong)
    assert fault == "[1].inserted.image.virtual-size is not a whole number"
    assert answer_fault("query-block", 5) == "it is not a list"


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "[]", "5", "null", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, "\ud800"),
        *('{"folder": 5}', '{"folder": "/x"}', NOTE.replace("/tmp", "tmp"), NOTE + NOTE),
    ],
)
def test_a_note_that_is_not_ours_is_a_value_error(text: str) -> None:
    for decode in (vmstate_commands.decode_memory_note, poweroff.decode_poweroff_note):
        with pytest.raises(ValueError, match=r"not|nested"):
            decode(text)


def test_every_question_whose_answer_is_read_has_a_shape() -> None:
    """A command that begins with query- is asked for its answer."""
    root = Path(__file__).parents[3] / "control"
    asked = set()
    for file in root.rglob("*.py"):
        if "monitor/commands" in str(file) or "monitor/human" in str(file):
            continue  # names that others ask us for
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            word = node.value if isinstance(node, ast.Constant) else None
            if isinstance(word, str) and re.fullmatch("(x-debug-)?query(-[a-z]+)+", word):
                asked.add(word)
    ours = {"query-commands", "query-backup", "query-events", "query-fdsets"}
    assert asked - ours <= SHAPES.keys()
    assert len(asked - ours) >= len(SHAPES) - len({"qom-get", "qom-list", "add-fd"})

# SPDX-License-Identifier: Apache-2.0
"""docs/wire-protocol.md is the authority: its examples and tables are held against the code."""

from __future__ import annotations

import re
import struct
from typing import get_args

import pytest

from tests.protocol.messages import EXAMPLES, encode
from tests.protocol.page import PAGE, ROOT, Example, literal, read_examples, table
from tests.protocol.test_states import ARCHIVER_TAKES, PRODUCER_TAKES
from vmapipe.clusters import sizes
from vmapipe.protocol import limits, transfer
from vmapipe.protocol.transfer import (
    ClusterFrame,
    Message,
    RunFrame,
    Scattered,
    SharedCluster,
    SharedRun,
    UnchangedRun,
)

KINDS = {name: type(message) for name, message in EXAMPLES.items()}
EXAMPLES_OF_THE_PAGE = list(read_examples("wire"))


def meant(text: str) -> Message:
    """What an example's first line says."""
    name, _, rest = text.partition(" ")
    if name != "DATA":
        kind = KINDS[name]
        message: Message = kind(**literal(rest))
        return message
    number, _, rest = rest.partition(" ")
    array, _, payload = rest.partition(" + ")
    match literal(array):
        case [dev_id, table]:
            entries = struct.iter_unpack(">IQH", table)
            return Scattered(int(number), dev_id, tuple(SharedCluster(*each) for each in entries))
        case [dev_id, int(first), int(count)]:
            return UnchangedRun(int(number), dev_id, first, count)
        case [dev_id, cluster_num, data]:
            return ClusterFrame(int(number), dev_id, cluster_num, data)
        case [dev_id, first, count, masks]:
            blocks = memoryview(literal(payload or "h''"))
            return RunFrame(int(number), dev_id, first, count, masks, blocks)
        case [dev_id, first, count, masks, position]:
            length = 4096 * int.from_bytes(masks).bit_count()
            return SharedRun(int(number), dev_id, first, count, masks, position, length)
    raise ValueError(text)


@pytest.mark.parametrize("example", EXAMPLES_OF_THE_PAGE, ids=lambda example: example.text[:24])
def test_an_example_of_the_page_is_what_we_read_and_what_we_write(example: Example) -> None:
    message = transfer.decode(example.parts)
    assert (type(message), message) == (type(meant(example.text)), meant(example.text))
    assert [bytes(part) for part in encode(meant(example.text))] == example.parts


def test_every_message_has_an_example() -> None:
    shown = {type(meant(example.text)) for example in EXAMPLES_OF_THE_PAGE}
    assert shown == set(KINDS.values())


def test_the_fields_of_the_page_are_those_of_the_messages() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    described = {}
    for section in sections:
        name = section.partition(" ")[0]
        if name in KINDS:
            fields = re.search(r"\| field \|.*\n\|[-| ]*\n((?:\|.*\n)+)", section)
            rows = fields[1].splitlines() if fields else []
            described[name] = [(row.split("|")[1].strip(), "default" in row) for row in rows]
    described["PONG"] = described["PING"]
    for name, kind in KINDS.items():
        if kind in get_args(transfer.Control):
            defaults = kind._field_defaults
            assert described[name] == [(field, field in defaults) for field in kind._fields]


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    ours = {name: value for name, value in vars(limits).items() if name.isupper()}
    page = {name: int(value) for name, value, _ in table("name")}
    of_clusters = {name: value for name, value in vars(sizes).items() if name in page}
    assert page == of_clusters | ours
    assert all(reason for *_, reason in table("name"))


def test_the_largest_part_of_the_page_is_that_of_the_code() -> None:
    sizes = [size for name, size in vars(limits).items() if re.match("MAX_.*_BYTES$", name)]
    assert f"No part is larger than\n  {max(sizes)} bytes" in PAGE


def test_the_charges_of_the_page_are_those_of_the_code() -> None:
    rows = [[int(cell) for cell in row] for row in table("clusters")]
    assert rows
    assert [limits.charge(clusters, data) for clusters, data, _ in rows] == [row[2] for row in rows]


def test_the_states_of_the_page_are_those_of_the_code() -> None:
    ours = [[a.value, message, then.value] for (a, message), then in ARCHIVER_TAKES.items()]
    ours += [[p.value, message, then.value] for (p, message), then in PRODUCER_TAKES.items()]
    # On the page a closed session ignores everything.
    assert sorted(table("state")) == sorted(row for row in ours if row[0] != "closed")


def test_every_error_code_in_the_code_stands_on_the_page() -> None:
    listed = {code for code, _ in table("code")}
    sources = [*(ROOT / "protocol").glob("*.py"), *(ROOT / "archiver").glob("*.py")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    used = set(re.findall(r'RemoteProtocolError\(\s*"([^"]*)"', text))
    used |= set(re.findall(r'return "([a-z-]+)", f?"', text))
    assert {"malformed", "too-large", "credit", "counts"} <= used
    assert used - listed == set()

# SPDX-License-Identifier: Apache-2.0
"""Section 14 of docs/wire-protocol.md is held against the code, as test_spec_page.py does the rest."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.protocol.page import PAGE, Example, literal, read_examples, table
from vmapipe.protocol import service

KINDS: dict[str, Any] = {
    "REFUSE" if kind is service.JobRefused else kind.__name__.removeprefix("Job").upper(): kind
    for kind in service.KINDS
}
EXAMPLES = list(read_examples("job"))


def meant(text: str) -> Any:
    name, _, fields = text.partition(" ")
    values = {
        key: tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if isinstance(value, list)
        else value
        for key, value in literal(fields).items()
    }
    return KINDS[name](**values)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.text[:16])
def test_an_example_of_the_page_is_what_we_read_and_what_we_write(example: Example) -> None:
    message = meant(example.text)
    assert [bytes(part) for part in service.encode(message)] == example.parts
    read = service.read_of_coordinator(*service.unpack_control(example.parts))
    assert (read or service.decode_of_service(example.parts)) == message


def test_every_message_about_jobs_has_an_example() -> None:
    assert {type(meant(example.text)) for example in EXAMPLES} == set(service.KINDS)


def test_the_fields_of_the_page_are_those_of_the_messages() -> None:
    for name, kind in KINDS.items():
        rows = table(f"field of {name}")
        ours = [(field, field in kind._field_defaults) for field in kind._fields]
        if name != "REFUSE":
            assert [(field, "default" in text) for field, _, text in rows] == ours


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    named = vars(service)
    ours = {key: value for key, value in named.items() if re.fullmatch("MAX_[A-Z_]+", key)}
    assert {name: int(value) for name, value, _ in table("name for jobs")} == ours


def test_the_section_names_what_a_service_does_not_take_as_a_name() -> None:
    assert "does not\nend in `.partial`, `.manifest.json` or `.digests`" in PAGE

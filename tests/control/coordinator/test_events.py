# SPDX-License-Identifier: Apache-2.0
"""The JSON events of real runs, against the schema and the page that describe them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import jsonschema
import pytest

from tests.machine import good, make_disk, next_event, run, started
from tests.producer.guard.serving import serving
from vmapipe.runtime.event_types import PublicEvent

DOCS = Path(__file__).parents[3] / "docs"
SCHEMA = json.loads((DOCS / "events.schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def events(output: bytes) -> Iterator[str]:
    """The names of all events, after each was checked."""
    for line in output.splitlines():
        event = json.loads(line)
        forms = [form for form in SCHEMA["oneOf"] if form["title"] == event["event"]]
        assert forms, f"nobody has described {event}"
        CHECK.validate(event)
        yield event["event"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", "A0h" * 8)


def test_a_backup_of_disks_at_rest(disk: Path, tmp_path: Path) -> None:
    words = ("--disk", f"a={disk}", "--disk", f"b={disk}", "--speed", "4M", tmp_path / "vm.vma")
    seen = list(events(good("backup", "--json", *words)))
    for name in ("listening", "reading", "begun", "progress", "transfer", "sent", "stored"):
        assert name in seen
    assert seen[-1] == "done"


def test_a_backup_of_a_disk_in_use_whose_limit_is_changed(disk: Path, tmp_path: Path) -> None:
    with (
        serving(tmp_path, d=disk) as served,
        started(
            *("backup", "--json", "--speed", "1K", "--monitor", served.monitor),
            *("--guest-latency", "5s"),
            tmp_path / "vm.vma",
        ) as backup,
    ):
        CHECK.validate(next_event(backup, "guest-latency"))
        good("speed", str(tmp_path / "vm.vma"), "0")
        output, _ = backup.communicate(timeout=60)
    seen = list(events(output))
    assert "speed" in seen
    assert seen[-1] == "done"


def test_an_archive_on_standard_output_has_its_manifest_among_its_events(disk: Path) -> None:
    done = run("backup", "--json", "--disk", f"a={disk}", "-")
    assert "manifest" in list(events(done.stderr))


@pytest.mark.parametrize("words", [["--disk", "/no/such"], []])
def test_a_backup_that_fails(tmp_path: Path, words: list[str]) -> None:
    done = run("backup", "--json", *words, tmp_path / "vm.vma")
    assert list(events(done.stdout))[-1] == "failed"


def test_a_backup_that_is_ended(disk: Path, tmp_path: Path) -> None:
    words = ("--speed", "1K", "--disk", f"a={disk}", tmp_path / "vm.vma")
    with started("backup", "--json", *words) as backup:
        next_event(backup, "begun")
        backup.send_signal(signal.SIGTERM)
        output, _ = backup.communicate(timeout=60)
    assert list(events(output))[-1] == "failed"


def test_a_restore_and_a_verification_also_of_damage(disk: Path, tmp_path: Path) -> None:
    archive = tmp_path / "vm.vma"
    good("backup", "--disk", f"a={disk}", archive)
    assert "restored" in list(events(good("restore", "--json", archive, tmp_path / "out")))
    assert list(events(good("verify", "--json", archive)))[-1] == "verified"
    with archive.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"damage")
    done = run("verify", "--json", archive)
    assert done.returncode == 4
    assert "verified" in list(events(done.stdout))


def kind(schema: dict[str, Any]) -> Any:  # noqa: PLR0911  one a form
    """What a schema allows, without bounds, in the form of `kind_of_type`."""
    if "const" in schema:
        return {schema["const"]}
    if "$ref" in schema:
        return {"number"}
    if "anyOf" in schema:
        return set().union(*map(kind, schema["anyOf"]))
    if "enum" in schema:
        return set(schema["enum"]) - {None} | ({"null"} if None in schema["enum"] else set())
    if schema["type"] == "array":
        return [kind(schema["items"])]
    if schema["type"] == "object":
        fields = schema.get("properties", {})
        assert not fields or schema["additionalProperties"] is False
        required = set(schema.get("required", ()))
        return {name: (kind(each), name in required) for name, each in fields.items()}
    return {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])


_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def kind_of_type(hint: Any) -> Any:  # noqa: PLR0911  one a form
    """What a type of runtime/event_types.py allows."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return kind_of_type(parts[0])
    if origin is Literal:
        return set(parts)
    if origin is list:
        return [kind_of_type(parts[0])]
    if origin is dict:
        return {}
    if origin in (UnionType, Union):
        return set().union(*map(kind_of_type, parts))
    if is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)
        return {
            name: (kind_of_type(each), get_origin(each) is not NotRequired)
            for name, each in hints.items()
        }
    return {_JSON_NAMES[hint]}


def test_the_schema_and_the_types_of_the_events_are_the_same() -> None:
    described = [kind(form) for form in SCHEMA["oneOf"]]
    for form, titled in zip(described, SCHEMA["oneOf"], strict=True):
        assert form.pop("time") == ({"number"}, True)  # what --json adds to each
        assert form["event"] == ({titled["title"]}, True)
    typed = [kind_of_type(each) for each in get_args(PublicEvent)]
    assert sorted(map(str, map(_in_order, described))) == sorted(map(str, map(_in_order, typed)))


def _in_order(value: Any) -> Any:
    """Return it with sets and dicts as sorted lists, so that a difference can be read."""
    match value:
        case dict():
            return [(name, _in_order(value[name])) for name in sorted(value)]
        case set():
            return sorted(value)
        case list() | tuple():
            return [_in_order(each) for each in value]
    return value


def test_what_is_not_described_is_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"event": "notice", "time": 1.0},
        {"event": "notice", "time": 1.0, "text": "x", "more": 1},
        {"event": "notice", "text": "x"},
        {"event": "sent", "time": 1.0, "device": "a", "bytes": -1, "zero_bytes": 0},
    ]
    for event in wrong:
        assert not CHECK.is_valid(event)


def test_the_page_for_people_has_every_event_with_all_its_fields() -> None:
    page = (DOCS / "operations" / "reports.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)`(?: \([^)]*\))? \| (.*) \|$", page, re.MULTILINE)
    said: dict[str, str] = {}
    for name, text in rows:
        said[name] = said.get(name, "") + text
    for form in SCHEMA["oneOf"]:
        for field in set(form["properties"]) - {"event", "time"}:
            assert f"`{field}`" in said[form["title"]], (form["title"], field)

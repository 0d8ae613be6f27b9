# SPDX-License-Identifier: Apache-2.0
"""The reference tool's map: what it takes, and its words for what it does not."""

from __future__ import annotations

import pytest

from vmapipe.restore.targets.map_file import MapEntry, MapError, parse_map


def one(line: str) -> MapEntry:
    return parse_map([line + "\n"])["d"]


def words(line: str) -> str:
    with pytest.raises(MapError) as caught:
        parse_map([line])
    return str(caught.value)


def test_a_line_names_a_device_a_target_and_whether_zeroes_are_written() -> None:
    assert one("1:d=/dev/vg/x") == MapEntry("/dev/vg/x", write_zeroes=True)
    assert one("0:d=/x=y:z") == MapEntry("/x=y:z", write_zeroes=False)


def test_options_come_in_any_order() -> None:
    entry = MapEntry("/x", write_zeroes=False, bytes_per_s=1000, throttling_group="g")
    raw = entry._replace(image_format="raw")
    assert one("format=raw:throttling.bps=1000:throttling.group=g:cache=none:0:d=/x") == raw
    assert one("cache=unsafe:throttling.group=g:throttling.bps=0x3e8:0:d=/x") == entry
    assert one("throttling.bps=01750:throttling.group=g:0:d=/x") == entry


def test_skip_names_a_device_only() -> None:
    assert one("skip=d").skip


@pytest.mark.parametrize("end", ["done\n", "done", "\n", ""])
def test_the_map_ends_at_its_end_and_takes_no_line_behind(end: str) -> None:
    lines = iter(["1:a=/a\n", end, "nonsense\n"])
    assert list(parse_map(lines)) == ["a"]
    assert next(lines) == "nonsense\n"


def test_the_map_may_just_stop() -> None:
    assert list(parse_map(["1:a=/a\n", "skip=b"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", "read map failed - parse error ('nonsense')"),
        ("2:d=/x", "read map failed - parse error ('2:d=/x')"),
        ("size=1:1:d=/x", "read map failed - parse error ('size=1:1:d=/x')"),
        ("1:d", "read map failed - no dev name specified ('1:d')"),
        ("1:=/x", "read map failed - no dev name specified ('1:=/x')"),
        ("1:d=", "read map failed - parse error ('1:d=')"),
        ("format=raw", "read map failed - option 'format' not terminated ('format=raw')"),
        (
            "cache=none:cache=none:1:d=/x",
            "read map failed - duplicate value for option 'cache'",
        ),
        ("throttling.bps=fast:1:d=/x", "read map failed - not a number: fast"),
        ("throttling.bps=-1:1:d=/x", "read map failed - not a number: -1"),
        ("throttling.bps=099:1:d=/x", "read map failed - not a number: 099"),
        (
            "throttling.bps=18446744073709551616:1:d=/x",
            "read map failed - not a number: 18446744073709551616",
        ),
        ("skip", "read map failed - option 'skip' has no value ('skip')"),
        ("skip=", "read map failed - option 'skip' has no value ('skip=')"),
        ("skipper", "read map failed - option 'skip' has no value ('skipper')"),
        ("cache=often:1:d=/x", "invalid cache option: often"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_references_words(line: str, expected: str) -> None:
    assert words(line) == expected


@pytest.mark.parametrize("name", ["qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc"])
def test_a_format_that_qemu_writes_to_is_taken(name: str) -> None:
    assert one(f"throttling.group=g:format={name}:1:d=/x").image_format == name


@pytest.mark.parametrize("name", ["cloop", "host_device", "QCOW2", "qcow2,file.filename=/x"])
def test_another_format_is_refused(name: str) -> None:
    assert f"restoring to format '{name}' is not available" in words(f"format={name}:1:d=/x")


def test_a_device_that_is_mapped_twice_is_refused() -> None:
    with pytest.raises(MapError, match="device 'd' is mapped twice"):
        parse_map(["1:d=/x\n", "skip=d\n"])


def test_a_line_without_an_end_is_refused() -> None:
    assert "parse error" in words("1:d=/" + "x" * 9000)

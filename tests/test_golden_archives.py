# SPDX-License-Identifier: Apache-2.0
"""The golden archives are all there, and the list of what they hold fits them."""

from __future__ import annotations

from pathlib import Path

from tests.golden_archives import GoldenItem


def test_every_golden_archive_is_unpacked_and_listed(
    golden: Path, golden_digests: dict[str, list[GoldenItem]]
) -> None:
    archives = sorted(golden.iterdir())
    assert [archive.name for archive in archives] == sorted(golden_digests)
    for archive in archives:
        with archive.open("rb") as file:
            assert file.read(4) == b"VMA\0"


def test_the_list_has_configs_and_devices(golden_digests: dict[str, list[GoldenItem]]) -> None:
    items = [item for listed in golden_digests.values() for item in listed]
    assert {item.kind for item in items} == {"config", "device"}
    assert GoldenItem("device", "vmstate", 196608, items[-1].sha256) == items[-1]

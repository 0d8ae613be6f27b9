# SPDX-License-Identifier: Apache-2.0
"""The restored disk is the disk at the instant, whatever guests do meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.producer.guard.hammer import Backup, Guest, begin, guarding, make_image


def one_run(folder: Path, seed: int) -> tuple[int, int]:
    """Clusters that were saved, and operations of the guests."""
    chance = random.Random(seed)
    image = folder / "image"
    size = make_image(image, chance)
    with guarding(folder, image) as place:
        guests = [Guest(place, seed * 10 + index, size) for index in range(chance.randint(1, 3))]
        backup = Backup(place, chance.choice((16, 17, 40)), chance)
        try:
            for guest in guests:
                guest.start()
            for guest in guests:
                assert guest.busy.wait(60)
            wanted = begin({"d": place}, folder)["d"]
            backup.run()
        finally:
            backup.close()
            for guest in guests:
                guest.stop.set()
            for guest in guests:
                guest.join(60)
        for guest in guests:
            assert guest.fault is None, f"a guest saw {guest.fault!r}"
        assert bytes(backup.content) == wanted
        return backup.saved_clusters, sum(guest.operations for guest in guests)


def runs(folder: Path, seeds: range) -> None:
    saved = operations = 0
    for seed in seeds:
        try:
            more = one_run(folder, seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        saved, operations = saved + more[0], operations + more[1]
    print(f"{len(seeds)} runs: {saved} clusters saved before {operations} changes")
    assert saved > 5 * len(seeds), "hardly anything was copied before a write: this shows nothing"


@pytest.mark.parametrize("part", range(4))
def test_the_backup_shows_the_instant_byte_for_byte(tmp_path: Path, part: int) -> None:
    runs(tmp_path, range(50 * part, 50 * (part + 1)))


@pytest.mark.soak
def test_the_backup_shows_the_instant_in_thousands_of_runs(tmp_path: Path) -> None:
    runs(tmp_path, range(1000, 4000))

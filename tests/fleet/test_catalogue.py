# SPDX-License-Identifier: Apache-2.0
"""The catalogue: what is stored comes back, an end counts once, and a broken file is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.records import (
    ArchiveRecord,
    DrillRecord,
    MachineRecord,
    Record,
    RunRecord,
    Standing,
    VerificationRecord,
)
from vmapipe.fleet.sqlite_file import open_file
from vmapipe.runtime.errors import Failure

HOSTILE = "we'b\"; DROP TABLE runs; --\n\x1b[2J\0\udc80"


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    found = open_file(str(tmp_path / "new" / "fleet.db"))
    yield found
    found.close()


def run(name: str = "r1", **changes: object) -> RunRecord:
    record = RunRecord(name, "backup", "web", "pve1", "b1", "web-1.vma", "running", 9.0, 10.0)
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def test_every_kind_of_record_comes_back_as_it_was(catalogue: Catalogue) -> None:
    records: list[Record] = [
        MachineRecord("web", "uuid", "pve1", "qmp", "a,b", "running", "ceph", 5, 1.5, 2.5),
        ArchiveRecord("web", "b1", "web-1.vma", "/b/web-1.vma", size_bytes=1 << 62),
        run(),
        VerificationRecord("web", "b1", "web-1.vma", 3.25, "damaged", True, 1.0, "gone"),
        DrillRecord("web", "b1", "web-1.vma", 4.0, "booted", 12.5, "agent", "/p.png"),
        Standing("web", "backup", "b1", 1.0, 2.0, "web-1.vma"),
    ]
    catalogue.put(*records)
    catalogue.put(*records)  # a second time nothing is doubled
    assert [found for r in records for found in catalogue.select(type(r))] == records


def test_a_hostile_name_is_a_name_and_nothing_else(catalogue: Catalogue) -> None:
    catalogue.put(run(machine=HOSTILE), run("r2"))
    names = {record.machine for record in catalogue.select(RunRecord)}
    assert names == {"we'b\"; DROP TABLE runs; --\n\x1b[2J\\x00\\udc80", "web"}
    with pytest.raises(ValueError, match="no field"):
        catalogue.select(RunRecord, order="1=1 OR run")


def test_an_end_counts_once_however_often_it_is_told(catalogue: Catalogue) -> None:
    catalogue.put(run())
    failed = run(state="failed", ended_s=20.0, text="no room")
    assert catalogue.finish(failed)
    assert not catalogue.finish(failed)
    assert catalogue.standings()["web", "backup", "b1"].failures == 1
    assert catalogue.running() == []
    done = run("r2", state="done", started_s=30.0, ended_s=40.0)
    assert catalogue.finish(done, ArchiveRecord("web", "b1", "web-1.vma"))
    standing = catalogue.standings()["web", "backup", "b1"]
    assert (standing.failures, standing.done_s, standing.ended_s) == (0, 30.0, 40.0)
    assert len(catalogue.select(ArchiveRecord)) == 1


def test_what_a_wrong_clock_has_put_into_the_future_does_not_hide_what_is_done_now(
    catalogue: Catalogue,
) -> None:
    for name, at_s in (("r1", 4e9), ("r2", 1000.0)):
        catalogue.put(run(name))
        catalogue.finish(run(name, state="done", started_s=at_s, ended_s=at_s + 1))
    assert catalogue.standings()["web", "backup", "b1"].done_s == 1000.0


def test_what_was_given_up_as_lost_may_still_tell_its_end(catalogue: Catalogue) -> None:
    catalogue.put(run())
    catalogue.finish(run(state="lost", ended_s=20.0))
    assert catalogue.standings()["web", "backup", "b1"].failures == 0
    assert catalogue.finish(run(state="done", ended_s=21.0))
    assert catalogue.standings()["web", "backup", "b1"].done_s == 10.0


def test_nothing_of_a_transaction_stays_when_it_fails(catalogue: Catalogue) -> None:
    def half() -> None:
        with catalogue.transaction():
            catalogue.put(run())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert catalogue.select(RunRecord) == []


def test_progress_of_an_ended_run_is_not_noted(catalogue: Catalogue) -> None:
    catalogue.put(run())
    catalogue.beat("r1", 11.0, 5, 10, 2.5)
    catalogue.finish(run(state="done", ended_s=12.0, done_bytes=10))
    catalogue.beat("r1", 13.0, 7, 10, 2.5)
    (record,) = catalogue.select(RunRecord)
    assert (record.state, record.done_bytes, record.ended_s) == ("done", 10, 12.0)


@pytest.mark.parametrize("content", [b"SQLite format 3\0" + b"\xff" * 4096, b"hello\n" * 100])
def test_a_file_that_is_no_catalogue_is_told_with_the_way_out(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "fleet.db"
    path.write_bytes(content)
    with pytest.raises(Failure, match="fleet rescan"):
        open_file(str(path))


def test_who_reads_neither_waits_for_a_writer_nor_fails_by_one(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    found = open_file(str(path))
    found.put(run())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM runs")
        # With a lock of its own it would give up after 20 s.
        assert found.running() == [run()]
        writer.execute("COMMIT")
    assert found.running() == []
    found.close()


def test_a_catalogue_that_is_damaged_in_its_middle_is_told_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    found = open_file(str(path))
    found.put(*(run(f"r{n}", text="x" * 500) for n in range(200)))
    found.close()
    raw = bytearray(path.read_bytes())
    for page in range(20 * 4096, len(raw) - 4096, 4096):
        raw[page : page + 4096] = b"\xff" * 4096
    path.write_bytes(raw)
    found = open_file(str(path))
    with pytest.raises(Failure, match=r"malformed.*fleet rescan"):
        found.select(RunRecord)
    found.close()


@pytest.mark.parametrize("value", ["x", b"x", "9e999", "-9e999", 1e300, b"\xff" * 9])
@pytest.mark.parametrize("column", ["stored_s", "size_bytes", "machine"])
def test_a_catalogue_with_what_cannot_be_is_told_with_the_way_out(
    column: str, value: object, tmp_path: Path
) -> None:
    """SQLite stores anything in any column."""
    if column == "machine" and not isinstance(value, bytes):
        return
    path = tmp_path / "fleet.db"
    found = open_file(str(path))
    found.put(ArchiveRecord("web", "b1", "a.vma"), ArchiveRecord("web", "b1", "b.vma"))
    with sqlite3.connect(path) as other:
        what = value if value not in ("9e999", "-9e999") else None
        words = f"UPDATE archives SET {column} = {value if what is None else '?'} WHERE archive = 'b.vma'"
        other.execute(words, [] if what is None else [what])
    other.close()
    with pytest.raises(Failure, match=rf"archives have {column} that cannot be.*fleet rescan"):
        found.select(ArchiveRecord)
    found.close()


def test_a_year_of_history_stays_and_what_is_older_goes_but_for_what_is_still_there(
    catalogue: Catalogue,
) -> None:
    now, year, old = 2e9, 2e9 - 366 * 86400, 2e9 - 401 * 86400
    kept: list[Record] = [
        MachineRecord("web", "", "pve1", "qmp", last_seen_s=now),
        MachineRecord("gone", "", "pve1", "qmp", vanished_s=year),
        ArchiveRecord("web", "b1", "still.vma", stored_s=old),
        ArchiveRecord("web", "b1", "lately.vma", removed_s=year),
        run("r1", state="done", ended_s=year),
        run("r2", state="running"),
        VerificationRecord("web", "b1", "still.vma", old, "damaged"),
        DrillRecord("web", "b1", "still.vma", old, "booted"),
        VerificationRecord("web", "b1", "lately.vma", year, "ok"),
        Standing("web", "backup", "b1", old, old, "still.vma"),
    ]
    goes: list[Record] = [
        MachineRecord("long-gone", "", "pve1", "qmp", vanished_s=old),
        ArchiveRecord("web", "b1", "old.vma", removed_s=old),
        run("r3", state="failed", ended_s=old),
        VerificationRecord("web", "b1", "old.vma", old, "ok"),
        DrillRecord("web", "b1", "old.vma", old, "booted"),
        Standing("long-gone", "backup", "b1", old, old, "old.vma"),
    ]
    catalogue.put(*kept, *goes)
    assert catalogue.forget_old(now) == len(goes)
    kinds = (MachineRecord, ArchiveRecord, RunRecord, VerificationRecord, DrillRecord, Standing)
    left = [record for kind in kinds for record in catalogue.select(kind)]
    assert set(left) == set(kept)
    assert catalogue.forget_old(now) == 0

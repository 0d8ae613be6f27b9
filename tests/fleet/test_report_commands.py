# SPDX-License-Identifier: Apache-2.0
"""`vmapipe fleet report` and `rescan`: the catalogue as a page, and made again from nothing but archives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fleet.report.records import DAY_S, HOUR_S, NOW_S, archive, drill, machine, small_fleet
from tests.fleet.test_run import HOSTILE, Site
from vmapipe.control.cli import fleet_report
from vmapipe.fleet.configuration import parse
from vmapipe.fleet.outcome import new_run
from vmapipe.fleet.planner import FleetTask
from vmapipe.fleet.records import ArchiveRecord
from vmapipe.fleet.report.check import judge
from vmapipe.fleet.report.facts import ReportInput
from vmapipe.fleet.rescan import read_place
from vmapipe.fleet.sqlite_file import open_file


def report(site: Site, *words: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.fleet("report", "--json", *words, code=code).stdout)
    return {row["machine"]: row for row in found["machines"]}


def due(site: Site) -> set[tuple[str, str]]:
    lines = site.fleet("plan", "--no-scan", "--json").stdout.splitlines()
    items = [json.loads(line) for line in lines]
    return {(item["machine"], item["verb"]) for item in items if item["starts"]}


def test_a_lost_catalogue_is_made_again_and_what_is_gone_is_noticed(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.fleet("scan")
    new = report(site)
    assert {name: [p["kind"] for p in row["problems"]] for name, row in new.items()} == {
        "db": ["new"],
        HOSTILE: ["new"],
    }
    site.fleet("run")
    before = report(site, "--html", str(tmp_path / "r.html"))
    assert [row["problems"] for row in before.values()] == [[], []]
    assert before["db"]["days"][-1] == "verified"
    assert "touch pwned" in (tmp_path / "r.html").read_text()

    for path in tmp_path.glob("fleet.db*"):
        path.unlink()
    site.fleet("scan")
    assert "2 archives in 1 targets" in site.fleet("rescan").stdout
    # What is stored is not stored once more; what was done with it is.
    assert due(site) == {("db", "prune"), (HOSTILE, "prune")}
    after = report(site)
    for name, row in before.items():
        assert after[name]["newest"]["archive"] == row["newest"]["archive"]
        assert after[name]["newest"]["disk_bytes"] == row["newest"]["disk_bytes"]
        assert abs(after[name]["age_s"] - row["age_s"]) < 600
        # Only the lost catalogue knew that it was verified: that is due again.
        assert after[name]["days"][-1] == "stored"

    (site.target / site.archives[0]).unlink()
    text = (tmp_path / "fleet.toml").read_text()
    (tmp_path / "fleet.toml").write_text(f'{text}\n[target.gone]\ndirectory = "{tmp_path}/gone"\n')
    told = site.fleet("rescan", code=1)
    assert "target gone: cannot look into" in told.stderr
    assert "1 archives in 1 targets" in told.stdout
    catalogue = site.catalogue()
    assert sorted(bool(a.removed_s) for a in catalogue.select(ArchiveRecord)) == [False, True]
    catalogue.close()
    assert sum(row["newest"] is None for row in report(site, code=4).values()) == 1
    assert {verb for _, verb in due(site)} >= {"backup"}


def test_what_jobs_tell_while_a_rescan_looks_is_newer_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a backup that ends meanwhile would count as removed, and be made once more."""
    site = Site(tmp_path)
    for name in ("kept", "pruned"):
        (site.target / f"{name}-2026_01_01-00_00_00.vma").write_bytes(b"x")
    site.fleet("rescan")
    read = read_place
    names = {"stored": "stored-2026_01_02-00_00_00.vma", "pruned": "pruned-2026_01_01-00_00_00.vma"}

    def look(*words: Any, **more: Any) -> Any:
        found = read(*words, **more)
        catalogue = site.catalogue()
        done = new_run(FleetTask("stored", "backup", "b", "pve1"), names["stored"], 5.0)
        catalogue.finish(
            dataclasses.replace(done, state="done", started_s=5.0, ended_s=6.0),
            ArchiveRecord("stored", "b", names["stored"]),
        )
        (pruned,) = catalogue.select(ArchiveRecord, machine="pruned")
        catalogue.put(pruned.removed(7.0))
        catalogue.close()
        return found

    monkeypatch.setattr(fleet_report, "read_place", look)
    site.fleet("rescan")
    catalogue = site.catalogue()
    left = {a.machine: a.removed_s for a in catalogue.select(ArchiveRecord)}
    assert left == {"kept": 0.0, "pruned": 7.0, "stored": 0.0}
    assert catalogue.standings()["stored", "backup", "b"].archive == names["stored"]
    catalogue.close()
    monkeypatch.undo()
    # Nothing has changed meanwhile: what is there counts, and what is not.
    site.fleet("rescan")
    catalogue = site.catalogue()
    left = {a.machine: bool(a.removed_s) for a in catalogue.select(ArchiveRecord)}
    assert left == {"kept": False, "pruned": False, "stored": True}
    catalogue.close()


def test_check_reads_less_than_the_report_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, _ = parse(
        b'[defaults]\ntarget = "b1"\nverify_every = "7d"\ndrill_every = "30d"\n'
        b'[vm.parked]\nskip = "told"\n[vm.homeless]\ntarget = ""\n'
        b'[host.pve1]\nguests = ["disks:/x"]\n[target.b1]\ndirectory = "/b"\n'
    )
    monkeypatch.setattr(fleet_report, "time", SimpleNamespace(time=lambda: NOW_S))
    records = small_fleet()
    more = [machine(name, first_seen_s=NOW_S - HOUR_S) for name in ("ahead", "emptied")]
    catalogue = open_file(str(tmp_path / "fleet.db"))
    catalogue.put(*records.machines, *records.archives, *records.verifications)
    catalogue.put(*records.drills, *records.runs, *more)
    # Of a year; of a wrong clock; removed, and then it is not new; booted once, and gone since.
    catalogue.put(*(archive("well", n * DAY_S) for n in range(2, 300)))
    catalogue.put(archive("ahead", -DAY_S), archive("ahead", 40 * HOUR_S))
    catalogue.put(archive("emptied", HOUR_S, "e.vma", removed_s=NOW_S))
    catalogue.put(drill("emptied", "e.vma", "not-booted"), drill("late", "g.vma", "not-booted"))
    whole = judge(fleet_report.facts_of(fleet, catalogue, "UTC", 31), {})
    read = list[ArchiveRecord]()

    def take(*fields: Any) -> ReportInput:
        read.extend(fields[1])
        return ReportInput(*fields)

    monkeypatch.setattr(fleet_report, "ReportInput", take)
    assert judge(fleet_report.problems_of(fleet, catalogue), {}) == whole
    assert len(whole.troubles) >= 10
    assert len(read) < 25
    catalogue.close()

# SPDX-License-Identifier: Apache-2.0
"""`vmapipe report`: folders of archives, and what stands beside them."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.machine import bad, good, make_disk, run
from vmapipe.access.drill.result import DrillResult, encode_result
from vmapipe.access.drill.screen import Picture, encode_png

PNG = encode_png(Picture(8, 4, bytes(96)))
NOW = datetime.datetime.now(datetime.UTC)
TODAY = f"{NOW:%Y_%m_%d-%H_%M_%S}"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web: verified, and booted in a restore test. old: of last year. damaged: verify has found that."""
    folder = tmp_path_factory.mktemp("kept")
    disk = make_disk(folder / "d.raw", "Ap0A")
    first = folder / f"vzdump-qemu-100-{TODAY}.vma"
    good("backup", "--quiet", "--disk", f"a={disk}", first, env={**os.environ, "TZ": "UTC"})
    shutil.copy(first, folder / "old-2025-11-02.vma")
    damaged = folder / f"damaged-{NOW:%Y-%m-%d}.vma"
    raw = bytearray(first.read_bytes())
    raw[-100] ^= 1
    damaged.write_bytes(raw)
    shutil.copy(f"{first}.manifest.json", f"{damaged}.manifest.json")
    good("verify", "--quiet", first)
    assert run("verify", "--quiet", folder).returncode == 4
    result = DrillResult(
        "00000000-0000-0000-0000-000000000001",
        f"{NOW:%Y-%m-%dT%H:%M:%SZ}",
        "booted",
        "it said login:",
        12.0,
        "text on the serial console",
        (),
        (),
        "tcg",
        "bios",
        False,
        1 << 20,
        f"{first.name}.drill",
    )
    (folder / f"{first.name}.drill.json").write_bytes(encode_result(result))
    (folder / f"{first.name}.drill").mkdir()
    (folder / f"{first.name}.drill" / "screen.png").write_bytes(PNG)
    return folder


def report(*words: str | Path, code: int = 4) -> str:
    done = run("report", *words, "--time-zone", "UTC", env={**os.environ, "TZ": "UTC"})
    assert done.returncode == code, done.stderr
    return done.stdout.decode()


def test_the_table_says_of_each_machine_what_is_wrong(kept: Path) -> None:
    lines = report(kept).splitlines()
    assert [line.split()[0] for line in lines] == ["MACHINE", "old", "damaged", "vzdump-qemu-100"]
    assert "one every 24 h was promised" in lines[1]
    assert "is damaged" in lines[2]
    assert lines[3].endswith("ok")


def test_the_page_shows_the_screen_of_the_restore_test(kept: Path, tmp_path: Path) -> None:
    page, metrics = tmp_path / "r.html", tmp_path / "r.prom"
    assert report(kept, "--html", page, "--metrics", metrics, "--title", "Backups of a & b") == ""
    text = page.read_text()
    assert "Backups of a &amp; b" in text
    assert text.count("data:image/png;base64,") == 1
    assert "booted</span> in 12 s" in text
    assert 'vmapipe_machine_problem{machine="damaged",host="",kind="damaged"} 1' in (
        metrics.read_text()
    )


def test_json_has_the_disks_sizes_of_the_newest_archives(kept: Path) -> None:
    found = json.loads(report(kept, "--json"))
    machines = {row["machine"]: row for row in found["machines"]}
    assert machines["vzdump-qemu-100"]["newest"]["disk_bytes"] == 4 * 65536
    assert machines["vzdump-qemu-100"]["verified"]["verdict"] == "ok"
    assert machines["vzdump-qemu-100"]["days"][-1] == "booted"
    assert machines["damaged"]["days"][-1] == "damaged"


def test_nothing_is_late_without_a_promise_and_missed_restore_tests_are_warnings(
    kept: Path, tmp_path: Path
) -> None:
    for file in kept.glob("old*"):
        shutil.copy(file, tmp_path)
    assert "ok" in report(tmp_path, "--every", "none", code=0)
    assert "no restore test ever" in report(
        tmp_path, "--every", "none", "--drill-every", "30d", code=0
    )


def test_what_strangers_put_beside_an_archive_is_not_believed(kept: Path, tmp_path: Path) -> None:
    name = f"x-{TODAY}.vma"
    shutil.copy(next(kept.glob("vzdump*.vma")), tmp_path / name)
    (tmp_path / f"{name}.drill.json").write_text('{"vmapipe_drill": 1}')
    (tmp_path / f"{name}.verified.json").write_text("[" * 5000)
    (tmp_path / f"{name}.manifest.json").write_bytes(b"\xff\n], {}")
    os.mkfifo(tmp_path / f"y-{TODAY}.vma.manifest.json")
    page = tmp_path / "r.html"
    report(tmp_path, "--html", page, code=0)
    assert "no picture" not in page.read_text()
    (tmp_path / "secret.png").write_bytes(PNG)
    for file in kept.glob("vzdump*.drill.json"):
        shutil.copy(file, tmp_path / f"{name}.drill.json")
    evidence = next(kept.glob("vzdump*.drill")).name
    (tmp_path / evidence).mkdir()
    (tmp_path / evidence / "screen.png").symlink_to(tmp_path / "secret.png")
    report(tmp_path, "--html", page, code=0)
    assert "no picture" in page.read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--every", "3"), "'3' is not a time such as 30m, 4h, 1d, 2w, or none"),
        (("--time-zone", "Mars/Dome"), "'Mars/Dome' is not known here"),
        (("--days", "0"), "--days is 1 to 366"),
    ],
)
def test_wrong_use_is_said_before_anything_is_looked_at(words: tuple[str, ...], text: str) -> None:
    assert text in bad("report", "/nowhere", *words, code=2)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "cannot look into" in bad("report", tmp_path / "none")

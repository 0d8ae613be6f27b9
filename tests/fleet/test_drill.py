# SPDX-License-Identifier: Apache-2.0
"""A restore test in a round of a fleet: a real guest boots, and its picture and seconds reach the report of another host."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.access.bootable import make_bootable
from tests.conftest import absent
from tests.fleet.test_run import MIB, Site
from tests.guest import find_kernel
from tests.machine import Need
from vmapipe.access.drill.screen import Picture, encode_png
from vmapipe.access.machine.accelerator import TCG, VARIABLE
from vmapipe.fleet.catalogue import Catalogue
from vmapipe.fleet.outcome import decode_picture
from vmapipe.fleet.records import PictureRecord
from vmapipe.fleet.sqlite_file import open_file

PNG = encode_png(Picture(720, 400, b"\x10\x20\x30" * 720 * 400))


@pytest.fixture
def site(tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A fleet of one machine, `web`, whose disk is still to be made, and which is to be booted."""
    need("qemu-system-x86_64", "setpriv")
    monkeypatch.setenv(VARIABLE, TCG)
    made = Site(tmp_path)
    for disk in tmp_path.glob("pve*/*.raw"):
        disk.unlink()
    file = tmp_path / "fleet.toml"
    file.write_text(file.read_text().replace('verify_every = "7d"', 'drill_every = "30d"'))
    return made


def _reported(site: Site, code: int) -> tuple[dict[str, Any], str]:
    """The machine's row, and the page, where there is the catalogue, and not the target's folder."""
    site.target.rename(site.folder / "elsewhere")
    page = site.folder / "r.html"
    done = site.fleet("report", "--json", "--html", str(page), code=code)
    (row,) = json.loads(done.stdout)["machines"]
    return row, page.read_text()


def test_a_machine_that_does_not_boot_is_in_the_report_of_another_host_with_its_screen(
    site: Site,
) -> None:
    (site.folder / "pve1" / "web.raw").write_bytes(b"x" + bytes(MIB))
    told = site.fleet("run", code=1, limit_s=300).stdout
    assert ": drill of web failed: " in told, told
    row, text = _reported(site, code=4)
    assert (row["drill"]["verdict"], row["days"][-1]) == ("not-booted", "damaged")
    assert [problem["kind"] for problem in row["problems"]] == ["not-booted"]
    assert text.count("data:image/png;base64,") == 1
    assert "No bootable device" in text


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_round_boots_what_it_has_stored_and_the_report_of_another_host_shows_the_screen(
    site: Site, need: Need
) -> None:
    kernel = find_kernel()
    if kernel is None:
        absent("a kernel for a guest; scripts/setup unpacks Debian's into .venv/kernel")
    make_bootable(need, kernel, site.folder / "made", site.folder / "pve1" / "web.raw")
    told = site.fleet("run", limit_s=300).stdout
    assert ": drill of web done" in told, told
    row, text = _reported(site, code=0)
    assert (row["drill"]["verdict"], row["days"][-1]) == ("booted", "booted")
    assert 0 < row["drill"]["boot_s"] < row["drill"]["seconds"] + 1
    assert text.count("data:image/png;base64,") == 1
    assert f"booted</span> in {row['drill']['boot_s']:.0f} s" in text


def _chunk(raw: bytes, kind: bytes) -> int:
    return raw.index(kind) - 4


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[:-1],
    "a word more": lambda raw: raw + b"x",
    "a chunk twice": lambda raw: raw[: _chunk(raw, b"IEND")] + raw[_chunk(raw, b"IDAT") :],
    "a damaged byte": lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
    "an endless side": lambda raw: encode_png(Picture(1 << 30, 1, b"")),
    "endless in all": lambda raw: encode_png(Picture(8192, 8192, b"")),
    "no side": lambda raw: encode_png(Picture(5, 0, b"")),
    "too many bytes": lambda raw: raw + bytes(1 << 20),
    "another format": lambda raw: b"GIF89a" + raw,
    "a page": lambda raw: raw[:8] + b"<script>alert(1)</script>",
    "nothing": lambda raw: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_a_bounded_picture_of_ours_is_not_shown(kind: str) -> None:
    assert decode_picture(base64.b64encode(PNG).decode()) == PNG
    assert decode_picture(base64.b64encode(HOSTILE[kind](PNG)).decode()) is None


@pytest.mark.parametrize("told", [None, 5, {}, "not base 64", "\udc80", "A" * (3 << 20)])
def test_what_a_host_tells_for_a_picture_may_be_anything(told: Any) -> None:
    assert decode_picture(told) is None


def test_the_catalogue_keeps_the_last_picture_of_a_machine_and_some_hundred_in_all(
    tmp_path: Path,
) -> None:
    catalogue: Catalogue = open_file(str(tmp_path / "fleet.db"))
    catalogue.put(*(PictureRecord(f"m{n}", "b1", "a.vma", float(n), "") for n in range(310)))
    catalogue.put(PictureRecord("m5", "b1", "b.vma", 400.0, ""))
    catalogue.forget_old(1e9)
    left = catalogue.select(PictureRecord, "tested_s")
    assert len(left) == 300
    assert (left[0].machine, left[-1].archive) == ("m11", "b.vma")
    catalogue.close()

# SPDX-License-Identifier: Apache-2.0
"""Domains, pools and folders that are called what their users like."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from tests.control.hosts.bench import WEB, Bench
from tests.machine import bad, good, make_disk
from vmapipe.runtime.text import escaped

# libvirt makes a socket for an agent's channel, whose path would be too long below the tests' own folder.
PLAIN = re.sub(r"<channel.*</channel>", "", WEB, flags=re.DOTALL)

# Of what a user of libvirt's can call things; the last is as long as it may be.
ODD = ("Büro 'ä' \"50%\" 🖥", "a,b=c;&<x>$(y)`#\\", "%s%20[::1]?x=1", "n" * 64)


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_names_may_be_odd_and_are_everywhere_the_same(
    bench: Bench, odd: str, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "odd.raw", "Ap")
    archive = bench.archive(
        f"odd{ODD.index(odd)}.vma", PLAIN.replace(">web<", f">{escape(odd)}<"), f"vda={disk}"
    )
    place = bench.place(odd[:20])
    pool = bench.folder / "pool.xml"
    text = f"<name>{escape(odd)}</name><target><path>{escape(str(place))}</path></target>"
    pool.write_text(f"<pool type='dir'>{text}</pool>")
    bench.libvirt("pool-create", pool)
    try:
        told = good(*bench.words(archive, "--pool", odd, "--start", "--json"))
        (defined,) = [e for e in map(json.loads, told.splitlines()) if e["event"] == "defined"]
        assert (defined["domain"], defined["disks"][0]["path"]) == (odd, f"{place}/{odd}-vda.qcow2")
        assert "is running" in bad(*bench.words(archive, "--pool", odd, "--overwrite"))
        bench.libvirt("destroy", "--domain", odd)
        again = bench.words(archive, "--dir", place, "--name", odd, "--overwrite", "--start")
        assert escaped(odd) in good(*again).decode()
        bench.libvirt("destroy", "--domain", odd)
        assert [path.name for path in place.iterdir()] == [f"{odd}-vda-1.qcow2"]
        bench.libvirt("undefine", "--domain", odd)
        if len(odd) < 64:  # a socket has to be in the folder
            good(*bench.words(archive, "--dir", place, "--name", "odd", "--start", "--live"))
            bench.libvirt("destroy", "odd")
            bench.libvirt("undefine", "odd")
    finally:
        bench.libvirt("pool-destroy", "--pool", odd)
    assert bench.state()[2] == []


@pytest.mark.parametrize("odd", ["a\nb", "a\x1bb", "a\tb", os.fsdecode(b"a\xff")], ids=range(4))
def test_a_folder_that_libvirt_could_not_name_is_refused_in_one_line(
    bench: Bench, small: Path, odd: str
) -> None:
    place = bench.place(odd)
    before = bench.state()
    for live in ((), ("--start", "--live")):
        said = bad(*bench.words(small, "--dir", place, *live), code=2)
        assert "libvirt cannot have a path with control characters" in said
        assert len(said.splitlines()) == 1
    assert (bench.state(), list(place.iterdir())) == (before, [])


def test_a_name_that_no_file_can_have_is_shown_with_the_way_out(
    bench: Bench, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "odd.raw", "A")
    archive = bench.archive("long.vma", WEB.replace(">web<", f">{'x' * 65}<"), f"vda={disk}")
    before = bench.state()
    said = bad(*bench.words(archive, "--pool", "p"), code=2)
    assert f"the machine is called '{'x' * 65}': say --name" in said
    assert bench.state() == before

# SPDX-License-Identifier: Apache-2.0
"""Restores to libvirt that fail, are interrupted or killed: nothing is left, and an old domain is as it was."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.control.hosts.bench import CONFLICT, LATE, UUID, Bench, attributes
from tests.machine import bad, end_of, good, next_event, run, started


def test_what_fails_in_the_middle_leaves_nothing_and_the_old_domain_as_it_was(
    bench: Bench, small: Path
) -> None:
    damaged = bench.folder / "damaged.vma"
    data = bytearray(small.read_bytes())
    data[-5000] ^= 1
    damaged.write_bytes(data)
    manifest = Path(f"{small}.manifest.json")
    Path(f"{damaged}.manifest.json").write_bytes(manifest.read_bytes())
    place = bench.place("failed")
    before = bench.state()
    for where in (("--pool", "p"), ("--dir", place, "--format", "raw")):
        assert "damaged" in bad(*bench.words(damaged, *where))
        assert bench.state() == before
        assert list(place.iterdir()) == []
    good(*bench.words(small, "--pool", "p"))
    before, xml = bench.state(), bench.libvirt("dumpxml", "web")
    bad(*bench.words(damaged, "--pool", "p", "--overwrite"))
    assert (bench.state(), bench.libvirt("dumpxml", "web")) == (before, xml)
    bench.libvirt("undefine", "web")
    bench.libvirt("vol-delete", "web-vda.qcow2", "p")


@pytest.mark.parametrize(("config", "is_early"), [(CONFLICT, True), (LATE, False)])
def test_a_domain_that_libvirt_does_not_take_leaves_nothing(
    config: str, is_early: bool, bench: Bench, small: Path
) -> None:
    path = bench.folder / "refused.xml"
    path.write_text(config)
    place = bench.place(f"refused-{is_early}")
    before = bench.state()
    where = ("--pool", "p") if is_early else ("--dir", place)
    done = run(*bench.words(small, *where, "--config", path, "--json"))
    assert done.returncode == 1
    assert "libvirt does not take the domain" in done.stderr.decode()
    assert (b'"restoring"' in done.stdout) is not is_early
    assert bench.state() == before
    assert list(place.iterdir()) == []


def _interrupted(bench: Bench, archive: Path, how: int, *where: str | Path) -> None:
    """A restore that gets this signal when some of its disk is written."""
    words = bench.words(archive, *where, "--speed", "256K", "--json", "--workers", "1")
    with started(*words) as restoring:
        while next_event(restoring, "progress")["done_bytes"] == 0:
            pass
        restoring.send_signal(how)
        restoring.wait()


def test_ctrl_c_leaves_nothing(bench: Bench, large: Path) -> None:
    place = bench.place("stopped")
    before = bench.state()
    for where in (("--pool", "p"), ("--dir", place)):
        _interrupted(bench, large, signal.SIGINT, *where)
        assert bench.state() == before
        assert list(place.iterdir()) == []


def test_a_domain_that_is_started_meanwhile_keeps_its_disks(
    bench: Bench, small: Path, large: Path
) -> None:
    good(*bench.words(small, "--pool", "p"))
    before = bench.state()
    words = bench.words(large, "--pool", "p", "--overwrite", "--speed", "8M", "--json")
    with started(*words) as restoring:
        while next_event(restoring, "progress")["done_bytes"] == 0:
            pass
        bench.libvirt("start", "web")
        code, said = end_of(restoring)
    assert (code, "the domain web is running" in said) == (1, True)
    assert bench.state() == before
    bench.libvirt("destroy", "web")
    bench.libvirt("undefine", "web")
    bench.libvirt("vol-delete", "web-vda.qcow2", "p")


def test_a_libvirtd_that_is_started_again_meanwhile_is_no_trouble(
    bench: Bench, large: Path
) -> None:
    words = bench.words(large, "--pool", "p", "--name", "again", "--speed", "8M", "--json")
    with started(*words) as restoring:
        while next_event(restoring, "progress")["done_bytes"] == 0:
            pass
        bench.libvirt.kill()
        bench.libvirt.start()
        assert next_event(restoring, "defined")["domain"] == "again"
    bench.libvirt("undefine", "again")
    bench.libvirt("vol-delete", "again-vda.qcow2", "p")


def test_what_a_killed_restore_has_left_is_removed_by_the_next_and_told(
    bench: Bench, small: Path, large: Path
) -> None:
    before = bench.state()
    _interrupted(bench, large, signal.SIGKILL, "--pool", "p", "--name", "killed")
    assert bench.state()[1] == {"killed-vda.qcow2"}
    assert len(bench.state()[2]) == 1
    # Any other restore to this libvirt.
    said = good(*bench.words(small, "--pool", "p", "--name", "next")).decode()
    assert "removed the volume killed-vda.qcow2 of the pool p, which a killed restore" in said
    domains, volumes, journals = bench.state()
    assert (domains - before[0], volumes, journals) == ({"next"}, {"next-vda.qcow2"}, [])
    bench.libvirt("undefine", "next")
    bench.libvirt("vol-delete", "next-vda.qcow2", "p")


def test_a_killed_restore_whose_domain_is_defined_is_complete(bench: Bench, small: Path) -> None:
    good(*bench.words(small, "--pool", "p", "--name", "done"))
    (uuid,) = attributes(bench, "done", r"<uuid>(.*)</uuid>")
    volume = bench.pool / "done-vda.qcow2"
    status = volume.stat()
    lines: list[dict[str, object]] = [
        {"version": 1, "uri": bench.libvirt.uri, "name": "done", "uuid": uuid, "archive": "x"},
        {
            "made": {
                "path": str(volume),
                "device": status.st_dev,
                "inode": status.st_ino,
                "pool": "p",
                "volume": volume.name,
            }
        },
    ]
    journals = bench.libvirt.folder / "state" / "vmapipe"
    # A restore that was killed before it could remove its journal, and half a line of another one.
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (journals / f"done-{uuid}.libvirt-restore").write_text(whole)
    (journals / "half.libvirt-restore").write_text(whole.replace(uuid, UUID) + '{"made"')
    # Nobody's, which is in nobody's way.
    junk = journals / "junk.libvirt-restore"
    junk.write_text("junk\n")
    bad(*bench.words(small, "--pool", "p", "--name", "done"), code=2)
    assert volume.exists()
    assert bench.state()[2] == [junk.name]
    junk.unlink()
    bench.libvirt("undefine", "done")
    bench.libvirt("vol-delete", volume.name, "p")

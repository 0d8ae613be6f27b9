# SPDX-License-Identifier: Apache-2.0
"""Jobs as they travel: nothing but what is listed becomes a command, whatever anybody sends."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.archiver.base.choice import read_name
from vmapipe.fleet.agent import serve_one
from vmapipe.fleet.inventory import Fleet, FleetHost, FleetMachine, FleetTarget, Policy
from vmapipe.fleet.jobs import (
    archive_name,
    check,
    command_of,
    request_of,
    safe_name,
    words_of,
)
from vmapipe.fleet.planner import FleetTask
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError

BACKUP: dict[str, Any] = {
    "verb": "backup",
    "run": "r1",
    "limit_s": 60,
    "kind": "qmp",
    "socket": "/run/vm/web.qmp",
    "archive": "web-2026_01_01-00_00_00.vma.zst",
    "directory": "/srv/b",
}
VERIFY: dict[str, Any] = {"verb": "verify", "run": "r", "limit_s": 1, "archive": "/srv/a.vma"}


@pytest.mark.parametrize(
    "changes",
    [
        {"archive": "exec:rm -rf /"},
        {"archive": "../../etc/passwd"},
        {"archive": "--hook=x"},
        {"archive": "/etc/cron.d/x"},
        {"directory": "/srv/../etc"},
        {"directory": "exec:id"},
        {"hook": "/bin/sh"},
        {"config": "/etc/shadow"},
        {"kind": "shell"},
        {"socket": "tcp:1.2.3.4:5"},
        {"speed": "1 --hook=/bin/sh"},
        {"disks": ["a", "--hook=x"]},
        {"disks": ["a=/etc/shadow"]},
        {"limit_s": 1e9},
        {"limit_s": True},
        {"verb": "restore"},
        {"run": "../x"},
        {"archiver": "tcp://x"},
    ],
)
def test_what_is_not_listed_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        command_of(check({**BACKUP, **changes}))


@pytest.mark.parametrize("place", ["exec:id", "-", "fd:3", "a.vma", "--help", "/a/../b", "s3:x"])
def test_an_archive_is_a_file_or_an_object_and_no_command(place: str) -> None:
    with pytest.raises(UsageError):
        check({**VERIFY, "archive": place})


def test_a_disk_cannot_bring_options_along() -> None:
    disk = {**BACKUP, "kind": "disks", "disk": "/srv/a.raw,format=qcow2,others=yes"}
    del disk["socket"]
    with pytest.raises(UsageError):
        check(disk)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["backup", "verify", "drill", "copy", "prune"]),
    st.dictionaries(st.sampled_from([*BACKUP, "keep", "group", "to"]), st.text(), max_size=4),
)
def test_whatever_comes_is_refused_in_words_or_becomes_plain_words(
    value: object, verb: str, more: dict[str, str]
) -> None:
    for request in (value, {**BACKUP, "verb": verb, **more}, {**VERIFY, "verb": verb, "x": value}):
        try:
            words = command_of(check(request))
        except UsageError:
            continue
        assert words[0] in ("backup", "verify", "drill", "copy", "prune")
        assert all("\0" not in word for word in words)


@given(st.binary(max_size=60))
def test_an_agent_refuses_a_line_that_is_not_a_request(line: bytes) -> None:
    reader, writer = os.pipe()
    with contextlib.closing(Cancel()) as cancel, open(reader, "rb") as source:
        with open(writer, "wb") as asker:
            asker.write(line)
        with pytest.raises(UsageError):
            serve_one(source, _tell_nobody, cancel, _find_nothing)


def _tell_nobody(event: object) -> None:
    raise AssertionError(event)


def _find_nothing(rules: object) -> dict[str, object]:
    raise AssertionError(rules)


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_name_of_a_machine_becomes_an_archives_name_that_prune_finds_again(
    name: str, other: str
) -> None:
    archive = archive_name(name, "zstd", 1_800_000_000.0)
    found = read_name(archive)
    assert found is not None
    assert found.machine == safe_name(name)
    assert "/" not in archive
    assert len(archive.encode()) < 200
    assert archive[0] not in ".-"
    assert (safe_name(name) == safe_name(other)) == (name == other)


def test_a_planned_task_becomes_the_command_that_a_person_would_type() -> None:
    policy = Policy(target="b1", keep=(("last", 3),), speed="10M", exclude=("vdb",), freeze=True)
    target = FleetTarget("b1", directory="/srv/{host}", host="b1")
    fleet = Fleet({"pve1": FleetHost("pve1")}, {"b1": target}, defaults=policy)
    source = (("disks", ["vda", "vdb"]), ("domain", "web"))
    machine = FleetMachine("we b", "pve1", kind="libvirt", source=source)

    def words(verb: Any, archive: str = "", location: str = "") -> list[str]:
        task = FleetTask(machine.name, verb, "b1", "pve1", (), archive)
        request = request_of(fleet, task, machine, location, "r1", 1_800_000_000.0)
        return command_of(check(json.loads(json.dumps(request))))

    name = safe_name("we b")
    backup = words("backup")
    assert backup[-1] == f"/srv/pve1/{name}-2027_01_15-08_00_00.vma.zst"
    assert {"--libvirt=web", "--disk=vda", "--speed=10M", "--freeze", "--nice=10"} < set(backup)
    assert "--disk=vdb" not in backup
    assert words("prune", "a.vma") == [
        *("prune", "--yes", "--json", "--keep-last=3", f"--only={name}", "/srv/pve1")
    ]
    assert words("verify", "a.vma", "/srv/pve1/a.vma")[-1] == "/srv/pve1/a.vma"


def test_disks_are_named_or_left_out_and_never_all_of_them_by_mistake() -> None:
    """A qemu-storage-daemon needs their names; no name at all would mean all."""

    def words(kind: str, source: dict[str, Any], **changes: Any) -> set[str]:
        fleet = Fleet(
            {"a": FleetHost("a")},
            {"b": FleetTarget("b", directory="/srv")},
            defaults=Policy(target="b", guest_latency="20ms", **changes),
        )
        machine = FleetMachine("web", "a", kind=kind, source=tuple(source.items()))
        task = FleetTask("web", "backup", "b", "a")
        return set(command_of(request_of(fleet, task, machine, "", "r1", 1.0)))

    daemon = {"socket": "/run/web.qmp"}
    domain = {"domain": "web", "disks": ["vda", "vdb"]}
    assert {"--disk=vda", "--guest-latency=20ms"} < words("qmp", daemon, disks=("vda",))
    assert "--disk=vdb" not in words("libvirt", domain, disks=("vda", "vdb"), exclude=("vdb",))
    with pytest.raises(UsageError, match="leaves none of its disks"):
        words("libvirt", domain, exclude=("vda", "vdb"))
    # Disks at rest have no guest.
    assert "--guest-latency=20ms" not in words("disks", {"disk": "/srv/a.raw"})


def test_a_copy_takes_no_speed_and_goes_into_the_folder_of_a_target_that_has_a_bucket_too() -> None:
    target = FleetTarget("off", directory="/off/{host}", s3="s3://bucket/x", copy_from="b")
    fleet = Fleet({"a": FleetHost("a")}, {"off": target}, defaults=Policy(speed="10M"))
    task = FleetTask("web", "copy", "off", "a", archive="web-1.vma")
    request = request_of(fleet, task, FleetMachine("web", "a"), "/srv/web-1.vma", "r1", 1.0)
    assert command_of(request) == ["copy", "--json", "/srv/web-1.vma", "/off/a"]


def test_a_job_without_options_for_its_load_runs_below_nice_and_ionice() -> None:
    words = words_of(["vmapipe", "verify"], {**VERIFY, "nice": 10, "ionice": "idle"})
    assert words == ["nice", "-n", "10", "ionice", "-t", "-c", "3", "vmapipe", "verify"]

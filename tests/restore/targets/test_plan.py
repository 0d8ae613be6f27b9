# SPDX-License-Identifier: Apache-2.0
"""What is to be restored where: chosen by name, and refused where it cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmapipe.restore.archive.errors import PlanError, RestoreError
from vmapipe.restore.targets.map_file import MapEntry
from vmapipe.restore.targets.plan import (
    Kind,
    Larger,
    Plan,
    TargetSpec,
    check_plan,
    config_paths,
    plan_folder,
    plan_map,
    renamed_configs,
)
from vmapipe.vma.errors import HeaderError
from vmapipe.vma.header import Config, Device, Header

DEVICES = (Device(1, "scsi0", 512), Device(2, "vmstate", 65536), Device(7, "ide0", 1000))


def header(
    devices: tuple[Device, ...] = DEVICES, configs: tuple[Config, ...] = (Config("a.conf", b""),)
) -> Header:
    return Header(bytes(16), 0, devices, configs)


def absent(path: str) -> bool:
    return False


def test_all_devices_become_new_files_by_their_names() -> None:
    plan = plan_folder(header(), "/out")
    assert {dev_id: spec.path for dev_id, spec in plan.targets.items()} == {
        1: "/out/disk-scsi0.raw",
        2: "/out/vmstate.bin",
        7: "/out/disk-ide0.raw",
    }
    assert {spec.kind for spec in plan.targets.values()} == {Kind.NEW}
    assert plan.configs_folder == "/out"


def test_chosen_devices_go_where_they_are_sent() -> None:
    chosen = [("ide0", "/dev/there"), ("scsi0", "/new.raw"), ("vmstate", None)]
    plan = plan_folder(header(), "/out", chosen, exists=lambda path: path == "/dev/there")
    assert plan.targets == {
        7: TargetSpec("/dev/there", Kind.EXISTING, write_zeroes=True),
        1: TargetSpec("/new.raw", Kind.NEW),
        2: TargetSpec("/out/vmstate.bin", Kind.NEW),
    }


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(PlanError, match="no device 'ide9'; it has scsi0, vmstate, ide0"):
        plan_folder(header(), "/out", [("ide9", None)])
    with pytest.raises(PlanError, match="no device 'ide9'; it has scsi0, vmstate, ide0"):
        plan_map(header(), {"ide9": MapEntry(skip=True)}, "/out")
    with pytest.raises(PlanError, match="it has none at all"):
        plan_folder(header(()), "/out", [("ide9", None)])


def test_a_device_that_is_chosen_twice_is_refused() -> None:
    with pytest.raises(PlanError, match="'scsi0' was named twice"):
        plan_folder(header(), "/out", [("scsi0", None), ("scsi0", "/x")])


def test_a_map_sends_every_device_somewhere_or_skips_it() -> None:
    entries = {
        "scsi0": MapEntry("/dev/a", write_zeroes=False, bytes_per_s=5),
        "ide0": MapEntry(skip=True),
    }
    plan = plan_map(header(), entries, "/out")
    assert plan.targets == {
        1: TargetSpec(
            "/dev/a", Kind.EXISTING, write_zeroes=False, bytes_per_s=5, larger=Larger.NEVER
        ),
        2: TargetSpec("/out/vmstate.bin", Kind.NEW),
    }
    assert plan.configs_folder is None
    assert 2 not in plan_map(header(), {**entries, "vmstate": MapEntry(skip=True)}, "/o").targets


def test_a_map_that_forgets_a_device_is_refused_in_the_references_words() -> None:
    with pytest.raises(PlanError, match=r"^no device name mapping for ide0$"):
        plan_map(header(), {"scsi0": MapEntry("/dev/a")}, "/out")


@pytest.mark.parametrize("name", ["../evil", "/abs", "a/b", "..", "new\nline", "nul\0l", "\x7f"])
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    # As a whole name ".." is harmless in disk-...raw; it is refused all the same.
    with pytest.raises(HeaderError, match="unsafe name"):
        plan_folder(header((Device(1, name, 512),)), "/out")
    with pytest.raises(HeaderError, match="unsafe name"):
        check_plan(header((), (Config(name, b""),)), Plan(configs_folder="/out"))


def test_two_devices_of_one_name_are_refused() -> None:
    twins = header((Device(1, "twin", 512), Device(2, "twin", 512)))
    with pytest.raises(RestoreError, match="two devices have the name 'twin'"):
        check_plan(twins, plan_folder(twins, "/out"))
    with pytest.raises(PlanError, match="2 devices of the name 'twin'"):
        plan_folder(twins, "/out", [("twin", "/x")])
    with pytest.raises(RestoreError, match="two devices have the name 'twin'"):
        check_plan(twins, plan_map(twins, {"twin": MapEntry("/x")}, "/out"))


def test_of_configs_of_one_name_all_but_one_get_another() -> None:
    names = ("twin", "twin", "twin.2", "twin", "other")
    twins = header((), tuple(Config(name, b"1") for name in names))
    assert config_paths(twins, "/out") == [
        f"/out/{name}" for name in ("twin", "twin.3", "twin.2", "twin.4", "other")
    ]
    check_plan(twins, plan_folder(twins, "/out"))
    assert [text.split("written as ")[1] for text in renamed_configs(twins)] == [
        "'twin.3'",
        "'twin.4'",
    ]
    # The configs themselves may have the names that others would get.
    pair = header((), (Config("a.2", b""), Config("a", b""), Config("a", b""), Config("a.2", b"")))
    assert len(set(config_paths(pair, ""))) == 4


def test_two_things_for_one_file_are_refused(tmp_path: Path) -> None:
    config = header(configs=(Config("disk-scsi0.raw", b""),))
    with pytest.raises(RestoreError, match=r"two things would be written to '.*disk-scsi0.raw'"):
        check_plan(config, plan_folder(config, str(tmp_path)))
    (tmp_path / "link").symlink_to(tmp_path)
    chosen = [("scsi0", f"{tmp_path}/link/x"), ("ide0", f"{tmp_path}/./x")]
    with pytest.raises(RestoreError, match="two things would be written to"):
        check_plan(header(), plan_folder(header(), "/out", chosen, exists=absent))


def test_vmstate_goes_only_to_a_new_file() -> None:
    with pytest.raises(PlanError, match="vmstate can only be restored to a new file"):
        check_plan(header(), Plan({2: TargetSpec("/dev/x", Kind.EXISTING)}))


def test_a_device_that_is_not_there_cannot_be_planned() -> None:
    with pytest.raises(PlanError, match="no device 99"):
        check_plan(header(), Plan({99: TargetSpec("/x", Kind.NEW)}))

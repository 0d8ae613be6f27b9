# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line of a live restore, and the disks of a running machine."""

from __future__ import annotations

import json

import pytest

from vmapipe.access.live.nodes import (
    LiveDisk,
    find_sources,
    machine_command,
    match_sources,
    node_names,
    with_policies,
)
from vmapipe.control.qemu.graph import Graph
from vmapipe.runtime.errors import UsageError
from vmapipe.vma.header import Device

DISK = LiveDisk(
    3,
    "drive-scsi0",
    1 << 20,
    "drive-scsi0",
    ("drive-scsi0",),
    "/t/over.qcow2",
    "/t/disk.raw",
    "raw",
    False,
)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("scsi-hd,drive=a", "scsi-hd,drive=a,rerror=stop,werror=stop"),
        ("scsi-hd,drive=a,werror=stop", "scsi-hd,drive=a,werror=stop,rerror=stop"),
        ("scsi-hd,drive=b", "scsi-hd,drive=b"),
        ("scsi-hd,serial=x,,drive=a", "scsi-hd,serial=x,,drive=a"),
        ("virtio-net-pci,netdev=a", "virtio-net-pci,netdev=a"),
        ('{"driver":"scsi-hd","drive":"b"}', '{"driver":"scsi-hd","drive":"b"}'),
        ("{not json", "{not json"),
    ],
)
def test_devices_on_our_disks_stop_the_machine_where_a_request_fails(
    device: str, expected: str
) -> None:
    assert with_policies(["-m", "1", "-device", device], ["a"]) == ["-m", "1", "-device", expected]


def test_a_device_in_json_gets_its_policies_too() -> None:
    (_, text) = with_policies(["-device", '{"driver":"scsi-hd","drive":"a"}'], ["a"])
    assert json.loads(text) == {
        "driver": "scsi-hd",
        "drive": "a",
        "rerror": "stop",
        "werror": "stop",
    }


@pytest.mark.parametrize(
    "device", ["ide-hd,drive=a,rerror=report", '{"driver":"ide-hd","drive":"a","werror":"enospc"}']
)
def test_another_policy_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=r"say [rw]error=stop, or leave it out"):
        with_policies(["-device", device], ["a"])


@pytest.mark.parametrize("words", [["-daemonize"], ["-incoming", "tcp:0:1"], ["-loadvm", "x"]])
def test_options_that_do_not_go_together_with_it_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"leave {words[0]} out"):
        machine_command(["qemu-system-x86_64", *words], [DISK], (), "s", "q")


def test_our_nodes_come_behind_qemus_name_and_before_all_options() -> None:
    words = ["sudo", "-n", "/usr/bin/qemu-system-x86_64", "-m", "1G"]
    found = machine_command(words, [DISK], (), "/r,un/s", "/r,un/q")
    assert found[:3] == words[:3]
    assert found[-2:] == ["-m", "1G"]
    assert found[3:5] == ["-qmp", "unix:/r,,un/q,server=on,wait=off"]
    nodes = [json.loads(found[at + 1]) for at, word in enumerate(found) if word == "-blockdev"]
    assert nodes[0]["server"] == {"type": "unix", "path": "/r,un/s"}
    assert nodes[-1]["node-name"] == "drive-scsi0"
    assert nodes[-1]["backing"] == nodes[0]["node-name"]


def test_a_disk_that_has_arrived_begins_on_its_target() -> None:
    found = machine_command(["kvm"], [DISK], [DISK.job], "s", "q")
    nodes = [json.loads(found[at + 1]) for at, word in enumerate(found) if word == "-blockdev"]
    assert [node["driver"] for node in nodes] == ["file", "raw"]
    assert nodes[-1]["node-name"] == "drive-scsi0"
    assert nodes[0]["filename"] == "/t/disk.raw"


def test_of_a_larger_target_only_the_disks_size_is_used() -> None:
    block = DISK._replace(is_block=True, limit_bytes=1 << 20, path="/dev/vg/lv")
    file, image = block.target_nodes("t")
    assert (file["driver"], image["size"]) == ("host_device", 1 << 20)
    nodes = block._replace(image_format="qcow2", is_block=False).target_nodes("t")
    assert [node["driver"] for node in nodes] == ["file", "qcow2", "raw"]
    assert (nodes[-1]["size"], nodes[-1]["node-name"]) == (1 << 20, "t")


def test_a_command_that_is_no_qemu_is_refused() -> None:
    with pytest.raises(UsageError, match="is not a QEMU"):
        machine_command(["virsh", "start"], [DISK], (), "s", "q")


def test_names_that_qemu_does_not_take_are_replaced_each_by_another() -> None:
    devices = [
        Device(1, "drive-scsi0", 1),
        Device(2, "my disk", 1),
        Device(3, "disk2", 1),
        Device(4, "x" * 32, 1),
        Device(5, "live-restore-1", 1),
    ]
    names = node_names(devices)
    assert (names[1], names[3]) == ("drive-scsi0", "disk2")
    assert len(set(names.values())) == 5
    assert all(len(name) < 32 and " " not in name for name in names.values())


def nodes_of(*nodes: tuple[str, str, dict[str, str]]) -> Graph:
    listed: list[dict[str, object]] = [
        {
            "node-name": name,
            "drv": drv,
            "file": f"nbd+unix:///{name[2:]}?socket=/s" if drv == "nbd" else name,
            "image": {"virtual-size": 1 << 20},
            "children": [{"child": role, "node-name": to} for role, to in below.items()],
        }
        for name, drv, below in nodes
    ]
    return Graph(listed)


def test_the_last_overlay_is_moved_and_a_limit_above_it_stays() -> None:
    graph = nodes_of(
        ("limit", "throttle", {"file": "top"}),
        ("top", "qcow2", {"file": "f2", "backing": "low"}),
        ("low", "qcow2", {"file": "f1", "backing": "format"}),
        ("format", "raw", {"file": "n-a b"}),
        ("n-a b", "nbd", {}),
        ("n-c", "nbd", {}),
        *((name, "file", {}) for name in ("f1", "f2")),
    )
    (source,) = find_sources(graph)
    assert (source.node, source.export, source.socket) == ("top", "a b", "/s")
    assert source.below[0] == "top"
    assert source.below.index("low") < source.below.index("format") < source.below.index("n-a b")
    ((device, found),) = match_sources([source], graph, [Device(1, "a b", 1 << 20)])
    assert (device.dev_id, found) == (1, source)
    with pytest.raises(UsageError, match="no disk on an overlay"):
        list(match_sources([source], graph, [Device(1, "c", 1 << 20)]))
    with pytest.raises(UsageError, match="another disk"):
        list(match_sources([source], graph, [Device(1, "a b", 1 << 21)]))

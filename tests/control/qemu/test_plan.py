# SPDX-License-Identifier: Apache-2.0
"""What is decided from QEMU's answers, without a QEMU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.control.qemu.disks import DiskChoiceOptions, Machine, MachineDisk, choose_disks
from vmapipe.control.qemu.features import Features
from vmapipe.control.qemu.graph import Graph
from vmapipe.control.qemu.jobs import (
    MAX_WORKERS,
    SLOW_BYTES_S,
    BackupSettings,
    BackupTarget,
    OwnObjects,
    begin_commands,
    check_name,
    check_nodes,
    devices_above_filters,
    disk_index,
    filter_name,
    job_name,
    overlays_above_filters,
    own_objects,
    own_targets,
    run_prefix,
)
from vmapipe.runtime.errors import Failure, UsageError

GIB = 1 << 30


def inserted(node: str, size: int = GIB, **more: Any) -> dict[str, Any]:
    image = {"virtual-size": size, "filename": f"/srv/{node}.qcow2"}
    return {"node-name": node, "ro": False, "drv": "qcow2", "image": image, **more}


SCSI = {"device": "drive-scsi0", "qdev": "scsi0", "inserted": inserted("n0")}
VIRTIO = {
    "device": "",
    "qdev": "/machine/peripheral/virtio1/virtio-backend",
    "inserted": inserted("n1", 3 * GIB),
}
ANONYMOUS = {
    "device": "virtio0",
    "qdev": "/machine/peripheral-anon/device[0]/virtio-backend",
    "inserted": inserted("#block123"),
}
NODE_ONLY = {
    "device": "",
    "qdev": "/machine/peripheral-anon/device[1]/virtio-backend",
    "inserted": inserted("disk"),
}
FIRMWARE = {
    "device": "drive-efidisk0",
    "qdev": "/machine/system.flash1",
    "inserted": inserted("#block7", 540672),
}
CDROM = {
    "device": "drive-ide2",
    "qdev": "ide2",
    "removable": True,
    "inserted": inserted("c", ro=True),
}
EMPTY = {"device": "ide1-cd0", "qdev": "/machine/unattached/device[23]", "removable": True}


def machine(*blocks: dict[str, Any], jobs: Any = (), nodes: Any = ()) -> Machine:
    return Machine(blocks, nodes, jobs)


def names(*blocks: dict[str, Any], wanted: tuple[str, ...] = ()) -> list[str]:
    return [disk.name for disk in choose_disks(machine(*blocks), DiskChoiceOptions(wanted)).disks]


def test_disks_are_called_as_proxmox_calls_them() -> None:
    assert names(SCSI, VIRTIO) == ["drive-scsi0", "drive-virtio1"]


def test_a_disk_without_an_id_has_the_name_of_its_drive_or_node() -> None:
    assert names(ANONYMOUS, NODE_ONLY, FIRMWARE) == ["virtio0", "disk", "drive-efidisk0"]


@pytest.mark.parametrize("device", ["", "pflash1"])
def test_the_variables_of_uefi_firmware_are_called_as_proxmox_calls_them(device: str) -> None:
    code = {"device": "", "qdev": "/machine/system.flash0", "inserted": inserted("c", ro=True)}
    block = {**FIRMWARE, "device": device}
    assert names(code, block) == ["drive-efidisk0"]
    assert names(code, block, wanted=("#block7",)) == ["drive-efidisk0"]


def test_commands_use_the_drive_where_there_is_one_and_else_the_node() -> None:
    disks = choose_disks(machine(SCSI, VIRTIO), DiskChoiceOptions()).disks
    assert disks == (
        MachineDisk("drive-scsi0", "drive-scsi0", GIB, is_thin=True),
        MachineDisk("drive-virtio1", "n1", 3 * GIB, is_thin=True),
    )


def test_qemu_takes_the_names_of_all_our_nodes_whatever_the_disks_number() -> None:
    run, index = "0" * 8, 253
    looks = check_nodes(check_name(run, index))
    for name in (job_name(run, index), filter_name(run, index), *looks):
        assert len(name) <= 31


def test_media_that_cannot_change_are_left_out() -> None:
    assert names(CDROM, SCSI, EMPTY) == ["drive-scsi0"]


@pytest.mark.parametrize("word", ["drive-virtio1", "virtio1", "n1", VIRTIO["qdev"]])
def test_a_disk_can_be_asked_for_by_any_of_its_names(word: str) -> None:
    assert names(SCSI, VIRTIO, wanted=(word, word, "virtio1")) == ["drive-virtio1"]


def test_a_node_of_no_device_can_be_asked_for() -> None:
    node = inserted("bare", 5 << 20)
    wishes = DiskChoiceOptions(("bare", "n0"))
    found = choose_disks(machine(SCSI, nodes=[node, inserted("n0")]), wishes).disks
    assert [(disk.name, disk.device) for disk in found] == [
        ("bare", "bare"),
        ("drive-scsi0", "drive-scsi0"),
    ]


@pytest.mark.parametrize(
    ("blocks", "wanted", "text"),
    [
        ([SCSI], ["sda"], "the machine has no disk 'sda', but drive-scsi0"),
        ([], ["sda"], "the machine has no disk 'sda'"),
        ([EMPTY], ["ide1-cd0"], "disk 'ide1-cd0': no medium is in it"),
        ([EMPTY, CDROM], [], "nothing to back up: .* drive-ide2: it is read-only"),
        ([], [], "nothing to back up"),
        ([{"device": "x", "inserted": inserted("n", 0)}], ["x"], "disk 'x': it is empty"),
        (
            [{"device": "x", "inserted": inserted("n", drv="mirror_top")}],
            [],
            "disk 'x': a block job is running on it .*'m1'",
        ),
        (
            [{"device": "m1", "inserted": inserted("n")}],
            [],
            r"disk 'm1': a block job \(mirror 'm1'\) is running on it; wait",
        ),
    ],
)
def test_what_cannot_be_backed_up_is_refused_with_the_reason(
    blocks: list[dict[str, Any]], wanted: list[str], text: str
) -> None:
    jobs = [{"device": "m1", "type": "mirror"}]
    with pytest.raises(Failure, match=text):
        choose_disks(machine(*blocks, jobs=jobs), DiskChoiceOptions(wanted))


def test_an_unknown_disk_is_wrong_use() -> None:
    with pytest.raises(UsageError):
        choose_disks(machine(SCSI), DiskChoiceOptions(("sda",)))


# --- the commands ---

TARGETS = [
    BackupTarget(MachineDisk("drive-scsi0", "drive-scsi0", GIB), "/t/0.sock", "disk"),
    BackupTarget(MachineDisk("drive-virtio1", "n1", GIB), "/t/1.sock", "disk"),
]
OLD = Features(frozenset({"x-perf"}), frozenset({"max-workers", "max-chunk"}))
SETTINGS = BackupSettings("01234567", 4096, 20)


def test_all_jobs_begin_in_one_transaction_after_their_targets() -> None:
    adds, filters, last = begin_commands(TARGETS, SETTINGS, OLD)
    assert filters == []
    assert [command.name for command in adds] == ["blockdev-add", "blockdev-add"]
    first = adds[0].arguments
    assert first["node-name"] == "vmapipe-01234567-0"
    assert len(first["node-name"]) <= 31
    assert first["server"] == {"type": "unix", "path": "/t/0.sock"}
    assert first["reconnect-delay"] == 30
    assert last.name == "transaction"
    assert [action["type"] for action in last.arguments["actions"]] == ["blockdev-backup"] * 2
    data = last.arguments["actions"][1]["data"]
    assert data["device"] == "n1"
    assert data["target"] == data["job-id"] == "vmapipe-01234567-1"
    assert (data["sync"], data["speed"], data["auto-dismiss"]) == ("full", 4096, False)


@pytest.mark.parametrize(
    ("more", "is_thin"),
    [
        ({}, True),
        ({"drv": "raw"}, False),  # tells its holes as zeroes that are allocated
        ({"drv": "vmdk"}, False),
        ({"drv": "throttle"}, False),
        ({"backing_file": "/srv/base.qcow2"}, False),
        ({"backing_file_depth": 1}, False),
        ({"backing_file_depth": 0}, True),
        ({"image": {"virtual-size": GIB, "backing-image": {"virtual-size": GIB}}}, False),
        ({"image": {"virtual-size": GIB, "backing-filename": "base.qcow2"}}, False),
    ],
)
def test_only_a_qcow2_image_without_a_backing_file_is_copied_without_its_empty_space(
    more: dict[str, Any], is_thin: bool
) -> None:
    """Where something lies below, what is not allocated is not zero."""
    node = {**inserted("n0"), **more}
    block = {"device": "drive-scsi0", "qdev": "scsi0", "inserted": node}
    (disk,) = choose_disks(machine(block), DiskChoiceOptions()).disks
    assert disk.is_thin is is_thin
    (named,) = choose_disks(Machine([], [node], []), DiskChoiceOptions(["n0"])).disks
    assert named.is_thin is is_thin
    data = begin_commands(
        [BackupTarget(disk, "/t/0.sock", "disk")], SETTINGS, OLD
    ).transaction.arguments["actions"][0]
    assert data["data"]["sync"] == ("top" if is_thin else "full")


def test_members_are_used_only_where_the_schema_has_them() -> None:
    old = begin_commands(TARGETS, SETTINGS, OLD).transaction.arguments["actions"][0]["data"]
    assert old["x-perf"] == {"max-workers": MAX_WORKERS}
    assert not {"on-cbw-error", "cbw-timeout"} & set(old)
    none = begin_commands(TARGETS, SETTINGS, Features(frozenset(), frozenset()))
    assert "x-perf" not in none.transaction.arguments["actions"][0]["data"]
    members = frozenset({"x-perf", "on-cbw-error", "cbw-timeout"})
    new = begin_commands(TARGETS, SETTINGS, Features(members, frozenset())).transaction
    data = new.arguments["actions"][0]["data"]
    assert (data["on-cbw-error"], data["cbw-timeout"]) == ("break-snapshot", 25)


# --- the undoing: against a model of QEMU ---

STATUSES = ["created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting"]


class Model:
    """What QEMU does with the commands that undo. `disks`: by device, the node that it uses."""

    def __init__(self, jobs: dict[str, str], nodes: set[str], disks: dict[str, str]) -> None:
        self.jobs, self.nodes, self.disks = jobs, nodes, disks

    def left(self, prefix: str) -> OwnObjects:
        blocks = [
            {"qdev": path, "inserted": {"node-name": node}} for path, node in self.disks.items()
        ]
        return own_objects(
            [{"id": name, "status": status} for name, status in self.jobs.items()],
            [{"node-name": name} for name in self.nodes],
            prefix,
            devices_above_filters(blocks, below, prefix),
        )

    def execute(self, name: str, arguments: Any) -> None:
        match name:
            case "job-cancel":
                assert self.jobs[arguments["id"]] not in ("concluded", "aborting")
                self.jobs[arguments["id"]] = "aborting"
            case "job-dismiss":
                assert self.jobs.pop(arguments["id"]) == "concluded"
            case "qom-set":
                assert not any(job.startswith("vmapipe-0") for job in self.jobs), "it still copies"
                self.disks[arguments["path"]] = arguments["value"]
            case "blockdev-del":
                node = arguments["node-name"]
                assert node not in self.jobs, "a job needs it"
                assert node not in self.disks.values(), "a device needs it"
                assert not any(node in needed_by(other) for other in self.nodes - {node})
                self.nodes.remove(node)

    def go_on(self) -> None:
        """A job that has copied all waits for a word, for ever."""
        for name, status in self.jobs.items():
            if status == "aborting":
                self.jobs[name] = "concluded"


def below(node: str) -> str:
    """A filter is on a disk."""
    return node.replace("vmapipe-", "disk-").removesuffix("-filter")


def needed_by(node: str) -> set[str]:
    """Nodes of ours that a node of ours is put on."""
    name, _, tail = node.rpartition("-")
    return {
        "a": {f"{name}-view"},
        "view": {f"{name.removesuffix('-look')}-filter"},
        "instant": {f"{name}-filter"},
        "filter": {name},
    }.get(tail, set())


_TAILS = ("", "-filter", "-instant", "-look-view", "-look-a", "-look-n")


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 9), st.sampled_from(["", "-look"])),
        st.sampled_from([*STATUSES, "concluded"]),
    ),
    st.sets(st.tuples(st.integers(0, 9), st.sampled_from(_TAILS))),
    st.sets(st.integers(0, 9)),
)
def test_from_any_state_undoing_ends_with_nothing_of_ours_and_all_of_others(
    jobs: dict[tuple[int, str], str], nodes: set[tuple[int, str]], moved: set[int]
) -> None:
    """`moved`: disks whose device writes through a filter of ours."""
    ours = {job_name("01234567", n) + tail: status for (n, tail), status in jobs.items()}
    filters = {filter_name("01234567", n) for n in moved}
    there = {job_name("01234567", n) + tail for n, tail in nodes} | filters
    while missing := {node for known in there for node in needed_by(known)} - there:
        there |= missing
    disks = {f"/machine/{n}": filter_name("01234567", n) for n in moved}
    model = Model(
        {**ours, "mirror0": "running", "vmapipe-89abcdef-0": "running"},
        {*there, "disk", "vmapipe-89abcdef-0"},
        {**disks, "/machine/x": "disk"},
    )
    prefix = run_prefix("01234567")
    for _ in range(7):
        for name, arguments in model.left(prefix).cleanup_commands():
            model.execute(name, arguments)
        model.go_on()
    assert model.left(prefix).nothing
    assert model.jobs == {"mirror0": "running", "vmapipe-89abcdef-0": "running"}
    assert model.nodes == {"disk", "vmapipe-89abcdef-0"}
    assert model.disks == {
        "/machine/x": "disk",
        **{f"/machine/{n}": below(filter_name("01234567", n)) for n in moved},
    }


def test_a_device_whose_filter_is_on_what_nobody_knows_is_left_where_it_is() -> None:
    """Anything else might be the wrong image. A device that can be ejected is never moved."""
    blocks: list[dict[str, Any]] = [
        {"qdev": "virtio0", "inserted": {"node-name": "vmapipe-1-0-filter"}},
        {"qdev": "fd0", "removable": True, "inserted": {"node-name": "vmapipe-1-1-filter"}},
        {"qdev": "virtio2", "inserted": {"node-name": "vmapipe-1-2"}},
    ]
    (writer,) = devices_above_filters(blocks, lambda node: "", "vmapipe-1-")
    assert writer == ("/machine/peripheral/virtio0", "vmapipe-1-0-filter", "")
    left = own_objects([], [{"node-name": "vmapipe-1-0-filter"}], "vmapipe-1-", [writer])
    assert left.cleanup_commands() == [("blockdev-del", {"node-name": "vmapipe-1-0-filter"})]


def test_an_image_that_was_put_above_a_filter_is_put_on_the_disk_before_the_filter_goes() -> None:
    """By a job of ours that ends by itself: cancelled, it would have done nothing."""
    name = "vmapipe-1-0-filter"
    edges = [("overlay", "backing", name), (name, "file", "disk"), ("disk", "file", "image")]
    numbers = {node: n for n, node in enumerate(["overlay", name, "disk", "image"])}
    graph = Graph(
        [],
        {
            "nodes": [
                {"id": n, "type": "block-driver", "name": node} for node, n in numbers.items()
            ],
            "edges": [{"parent": numbers[a], "name": r, "child": numbers[b]} for a, r, b in edges],
        },
    )
    found = overlays_above_filters(graph, [name, "vmapipe-1-0"])
    left = own_objects([], [{"node-name": name}], "vmapipe-1-", (), found)
    take_out, delete = left.cleanup_commands()
    words = {"job-id": f"{name}-take-out", "device": "overlay", "base-node": "disk"}
    assert take_out == ("block-stream", words)
    assert delete == ("blockdev-del", {"node-name": name})
    running = [{"id": f"{name}-take-out", "status": "running"}]
    busy = own_objects(running, [{"node-name": name}], "vmapipe-1-", (), found)
    assert busy.cleanup_commands() == []


def test_a_disk_that_is_handed_over_has_a_filter_and_a_job_that_copies_next_to_nothing() -> None:
    """All of the disk, whatever its image lacks: the guest writes there before the filter is."""
    disk = MachineDisk("drive-scsi0", "drive-scsi0", GIB, is_thin=True)
    targets = [BackupTarget(disk, "/t/0.sock", "disk", True, 25), TARGETS[1]]
    _, filters, last = begin_commands(targets, SETTINGS, OLD)
    (added,) = filters
    assert added.arguments["on-cbw-error"] == "break-snapshot"
    assert (added.arguments["file"], added.arguments["cbw-timeout"]) == ("drive-scsi0", 25)
    assert added.arguments["target"] == "vmapipe-01234567-0"
    first, second = (action["data"] for action in last.arguments["actions"])
    assert (first["sync"], first["speed"]) == ("full", SLOW_BYTES_S)
    assert first["filter-node-name"] == "vmapipe-01234567-0-job"
    assert "filter-node-name" not in second


def test_names_tell_their_disk() -> None:
    assert disk_index(job_name("01234567", 12)) == 12
    assert [disk_index(word) for word in ("disk-3", "vmapipe-x", "")] == [-1, -1, -1]


def test_the_targets_of_a_crashed_run_tell_where_they_look_for_their_sink() -> None:
    nodes: list[dict[str, Any]] = [
        {
            "node-name": "vmapipe-01234567-0",
            "drv": "nbd",
            "file": "nbd+unix:///disk?socket=/tmp/vmapipe-sinks-x/0.sock",
            "image": {"virtual-size": 512},
        },
        {"node-name": "other", "file": "nbd+unix:///disk?socket=/tmp/y"},
        {"node-name": "#block1", "file": "/srv/a.raw"},
        # Above a disk that is on another host's NBD server.
        {
            "node-name": "vmapipe-01234567-0-filter",
            "drv": "copy-before-write",
            "file": "nbd+unix:///disk?socket=/tmp/y",
        },
    ]
    (target,) = own_targets(nodes)
    assert target == ("vmapipe-01234567-0", "/tmp/vmapipe-sinks-x/0.sock", 512)


def test_a_job_is_made_to_send_something_before_it_is_cancelled() -> None:
    left = own_objects([{"id": "vmapipe-1-0", "status": "running"}], [], "vmapipe-")
    assert left.unthrottle() == [
        ("block-job-set-speed", {"device": "vmapipe-1-0", "speed": 0}),
    ]

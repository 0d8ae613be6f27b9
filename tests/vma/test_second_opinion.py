# SPDX-License-Identifier: Apache-2.0
"""Another project's reader takes what we pack."""

from __future__ import annotations

import io
import uuid

from dissect.archive.vma import VMA
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.archives import CTIME_S, UUID, Run, devices_and_runs, disk_image, header, pack, scan
from vmapipe.clusters.sizes import CLUSTER_BYTES, FULL_MASK
from vmapipe.vma.header import Config, Device


@given(devices_and_runs(), st.integers(1, 59))
@settings(max_examples=25)
def test_dissect_reads_our_archives_to_the_same_bytes(
    made: tuple[tuple[Device, ...], list[Run]], slots: int
) -> None:
    devices, runs = made
    configs = [Config("qemu-server.conf", b"cores: 2\n"), Config("empty.conf", b"")]
    raw = pack(header(devices, configs), runs, slots)
    other = VMA(io.BytesIO(raw))
    assert other.uuid == uuid.UUID(bytes=UUID)
    assert other.creation_time.timestamp() == CTIME_S
    assert other.configs() == {config.name: config.data for config in configs}
    found = {(d.id, d.name, d.size) for d in other.devices()}
    assert found == {(d.dev_id, d.name, d.size_bytes) for d in devices}
    events = scan(raw)
    for device in devices:
        assert other.device(device.dev_id).open().read() == disk_image(device, events)


def test_dissect_reads_a_disk_of_several_full_extents() -> None:
    device = Device(1, "drive-scsi0", 130 * CLUSTER_BYTES - 1)
    raw = pack(header([device]), [Run(1, 0, (FULL_MASK,) * 130)])
    assert VMA(io.BytesIO(raw)).device(1).open().read() == disk_image(device, scan(raw))

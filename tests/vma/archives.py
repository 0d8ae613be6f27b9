# SPDX-License-Identifier: Apache-2.0
"""Makes archives out of runs of clusters, and reads them back the plain way."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hypothesis import strategies as st

from vmapipe.clusters.sizes import BLOCK_BYTES, BLOCKS_PER_CLUSTER, CLUSTER_BYTES, FULL_MASK
from vmapipe.vma.coverage import Coverage
from vmapipe.vma.extent import block_pieces
from vmapipe.vma.header import Config, Device, Header, encode_header
from vmapipe.vma.packer import Packer
from vmapipe.vma.scanner import ExtentRead, HeaderRead, Scanner

UUID = bytes(range(16))
CTIME_S = 1353949200
Event = HeaderRead | ExtentRead


class Run(NamedTuple):
    """Consecutive clusters, as `Packer.add` takes them; one mask a cluster."""

    dev_id: int
    first: int
    masks: tuple[int, ...]

    @property
    def raw_masks(self) -> bytes:
        return struct.pack(f">{len(self.masks)}H", *self.masks) if any(self.masks) else b""

    @property
    def payload(self) -> bytes:
        return b"".join(cluster.data for cluster in self.clusters())

    def clusters(self) -> Iterator[Cluster]:
        for index, mask in enumerate(self.masks):
            num = self.first + index
            yield Cluster(self.dev_id, num, mask, stored_blocks(self.dev_id, num, mask))


class Cluster(NamedTuple):
    """One cluster, and its stored blocks back to back."""

    dev_id: int
    num: int
    mask: int
    data: bytes


def stored_blocks(dev_id: int, num: int, mask: int) -> bytes:
    """Blocks that tell whose they are."""
    return b"".join(
        (dev_id << 40 | num << 8 | bit | 1 << 63).to_bytes(8, "big") * (BLOCK_BYTES // 8)
        for bit in range(BLOCKS_PER_CLUSTER)
        if mask >> bit & 1
    )


def header(
    devices: Iterable[Device] = (), configs: Iterable[Config] = (), uuid: bytes = UUID
) -> Header:
    return Header(uuid, CTIME_S, tuple(devices), tuple(configs))


def pack(head: Header, runs: Iterable[Run], slots: int = 58) -> bytes:
    return encode_header(head) + b"".join(pack_extents(head.uuid, runs, slots))


def pack_extents(uuid: bytes, runs: Iterable[Run], slots: int = 58) -> Iterator[bytes]:
    packer: Packer[None] = Packer(uuid, slots)
    for run in runs:
        for extent in packer.add(
            run.dev_id, run.first, len(run.masks), run.raw_masks, run.payload, None
        ):
            yield b"".join(extent.buffers)
    for extent in packer.flush():
        yield b"".join(extent.buffers)


def scan(raw: bytes, cuts: Iterable[int] = ()) -> list[Event]:
    """All events of an archive that is fed in the pieces between the cuts."""
    scanner = Scanner()
    events: list[Event] = []
    for start, end in itertools.pairwise([0, *sorted(cuts), len(raw)]):
        events += scanner.feed(raw[start:end])
    scanner.close()
    return events


def extents_of(events: Iterable[Event]) -> list[ExtentRead]:
    return [event for event in events if isinstance(event, ExtentRead)]


def clusters_of(events: Iterable[Event]) -> list[Cluster]:
    """Every cluster in the archive's order, found from the masks alone."""
    found = []
    for event in extents_of(events):
        for run in event.extent.runs:
            at = run.data_at
            for index, mask in enumerate(run.masks):
                end = at + mask.bit_count() * BLOCK_BYTES
                data = bytes(event.data[at:end])
                found.append(Cluster(run.dev_id, run.first_cluster + index, mask, data))
                at = end
    return found


def read_whole(raw: bytes, cuts: Iterable[int] = ()) -> Header:
    """Read as a verifier does: every structure and all coverage. Raises ArchiveError."""
    events = scan(raw, cuts)
    head = events[0]
    assert isinstance(head, HeaderRead)
    coverage = Coverage(head.header)
    for event in extents_of(events):
        coverage.add(event.extent)
    coverage.finish()
    return head.header


def disk_image(device: Device, events: Iterable[Event]) -> bytes:
    """The device's contents, put together from what restore workers use."""
    size_bytes = device.size_bytes
    if device.is_vmstate:
        numbers = [c.num for c in clusters_of(events) if c.dev_id == device.dev_id]
        size_bytes = len(numbers) * CLUSTER_BYTES
    image = bytearray(size_bytes)
    for event in extents_of(events):
        for run in event.extent.runs:
            if run.dev_id == device.dev_id:
                for at, data_at, length in block_pieces(run, size_bytes):
                    image[at : at + length] = event.data[data_at : data_at + length]
    return bytes(image)


def repack(raw: bytes) -> bytes:
    """The archive once more, from what the scanner said of it."""
    events = scan(raw)
    head = events[0]
    assert isinstance(head, HeaderRead)
    packer: Packer[None] = Packer(head.header.uuid)
    out = [encode_header(head.header)]
    for event in extents_of(events):
        for run in event.extent.runs:
            masks = struct.pack(f">{run.count}H", *run.masks)
            data = event.data[run.data_at : run.data_at + run.data_bytes]
            for extent in packer.add(run.dev_id, run.first_cluster, run.count, masks, data, None):
                out += [bytes(buffer) for buffer in extent.buffers]
    for extent in packer.flush():
        out += [bytes(buffer) for buffer in extent.buffers]
    return b"".join(out)


def with_md5(raw: bytes | bytearray, md5_at: int) -> bytes:
    """The structure with a right checksum: what is wrong then is not damage but a lie."""
    fixed = bytearray(raw)
    fixed[md5_at : md5_at + 16] = bytes(16)
    fixed[md5_at : md5_at + 16] = hashlib.md5(fixed, usedforsecurity=False).digest()
    return bytes(fixed)


masks = st.one_of(
    st.just(0),
    st.just(FULL_MASK),
    st.sampled_from([1, 0x8000, 0x5555, 0xAAAA, 0x00F0, 0x7FFF, 0xFFFE]),
    st.integers(0, FULL_MASK),
)


@st.composite
def devices_and_runs(draw: st.DrawFn) -> tuple[tuple[Device, ...], list[Run]]:
    """Some devices, all their clusters exactly once, in any order, in runs of any length."""
    ids = draw(st.lists(st.integers(1, 254), min_size=1, max_size=4, unique=True))
    devices = []
    runs = []
    for dev_id in ids:
        clusters = draw(st.integers(1, 40))
        tail_bytes = draw(st.integers(1, CLUSTER_BYTES))
        devices.append(
            Device(dev_id, f"drive-{dev_id}", (clusters - 1) * CLUSTER_BYTES + tail_bytes)
        )
        at = 0
        while at < clusters:
            count = draw(st.integers(1, clusters - at))
            run_masks = draw(run_of_masks(count))
            if at + count == clusters:
                # Nothing beyond the device's end.
                blocks = -(-tail_bytes // BLOCK_BYTES)
                run_masks = (*run_masks[:-1], run_masks[-1] & ((1 << blocks) - 1))
            runs.append(Run(dev_id, at, run_masks))
            at += count
    return tuple(devices), draw(st.permutations(runs))


def run_of_masks(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(
        st.sampled_from([0, FULL_MASK]).map(lambda mask: (mask,) * count),
        st.lists(masks, min_size=count, max_size=count).map(tuple),
    )

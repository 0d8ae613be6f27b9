# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vma.archives import (
    UUID,
    Event,
    Run,
    clusters_of,
    devices_and_runs,
    disk_image,
    extents_of,
    header,
    pack,
    pack_extents,
    read_whole,
    scan,
    stored_blocks,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES, EXTENT_HEADER_BYTES, FULL_MASK, MAX_CLUSTERS
from vmapipe.protocol.limits import MAX_RUN_CLUSTERS
from vmapipe.vma.errors import LimitError
from vmapipe.vma.extent import encode_extent_header, encode_zero_extents, slot_word
from vmapipe.vma.header import HEADER_BYTES, Config, Device
from vmapipe.vma.packer import PackedExtent, Packer
from vmapipe.vma.scanner import HeaderRead, Scanner


@given(devices_and_runs(), st.integers(1, 59), st.data())
@settings(max_examples=60)
def test_scanning_what_was_packed_gives_the_same_clusters_in_the_same_order(
    made: tuple[tuple[Device, ...], list[Run]], slots: int, data: st.DataObject
) -> None:
    devices, runs = made
    raw = pack(header(devices), runs, slots)
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=12))
    events = scan(raw, cuts)
    assert clusters_of(events) == [cluster for run in runs for cluster in run.clusters()]
    head = events[0]
    assert isinstance(head, HeaderRead)
    assert set(head.header.devices) == set(devices)
    assert all(len(event.extent.runs) for event in extents_of(events))


@given(devices_and_runs(), st.data())
@settings(max_examples=40)
def test_any_split_of_the_bytes_gives_the_same_events(
    made: tuple[tuple[Device, ...], list[Run]], data: st.DataObject
) -> None:
    devices, runs = made
    raw = pack(header(devices), runs)
    # Near the edges of structures more often than elsewhere.
    edges = [0, 60, HEADER_BYTES, *(event.extent.offset for event in extents_of(scan(raw)))]
    near = st.builds(
        lambda edge, by: min(max(edge + by, 0), len(raw)),
        st.sampled_from(edges),
        st.integers(-2, EXTENT_HEADER_BYTES + 2),
    )
    cuts = data.draw(st.lists(st.one_of(near, st.integers(0, len(raw))), max_size=20))
    assert scan(raw, cuts) == scan(raw)


def test_one_byte_at_a_time_gives_the_same_events() -> None:
    raw = pack(header([Device(1, "a", 4097)]), [Run(1, 0, (3,))])
    assert scan(raw, range(len(raw))) == scan(raw)


@given(devices_and_runs())
@settings(max_examples=25)
def test_reading_just_what_is_wanted_never_reads_past_a_structure(
    made: tuple[tuple[Device, ...], list[Run]],
) -> None:
    devices, runs = made
    raw = pack(header(devices), runs, 7)
    scanner = Scanner()
    events: list[Event] = []
    at = 0
    while at < len(raw):
        wanted = scanner.wanted_bytes
        assert wanted > 0
        assert at + wanted <= len(raw)
        events += scanner.feed(memoryview(raw)[at : at + wanted])
        at += wanted
    scanner.close()
    assert events == scan(raw)


@given(devices_and_runs(), st.integers(1, 59))
@settings(max_examples=40)
def test_the_disks_come_out_complete_and_as_they_went_in(
    made: tuple[tuple[Device, ...], list[Run]], slots: int
) -> None:
    devices, runs = made
    raw = pack(header(devices), runs, slots)
    read_whole(raw)
    events = scan(raw)
    for device in devices:
        image = bytearray(device.clusters * CLUSTER_BYTES)
        for run in runs:
            for cluster in run.clusters() if run.dev_id == device.dev_id else ():
                for bit in range(16):
                    block = stored_blocks(device.dev_id, cluster.num, cluster.mask & 1 << bit)
                    at = cluster.num * CLUSTER_BYTES + bit * 4096
                    image[at : at + len(block)] = block
        assert disk_image(device, events) == image[: device.size_bytes]


@given(devices_and_runs(), st.integers(1, 59))
@settings(max_examples=20)
def test_every_extent_but_the_last_is_full(
    made: tuple[tuple[Device, ...], list[Run]], slots: int
) -> None:
    devices, runs = made
    events = extents_of(scan(pack(header(devices), runs, slots)))
    used = [sum(run.count for run in event.extent.runs) for event in events]
    assert all(count == slots for count in used[:-1])
    assert 1 <= used[-1] <= slots


def test_by_default_an_extent_takes_58_clusters_as_the_reference_does() -> None:
    runs = [Run(1, 0, (0,) * 59)]
    events = extents_of(scan(pack(header([Device(1, "a", 59 * CLUSTER_BYTES)]), runs)))
    assert [event.extent.runs[0].count for event in events] == [58, 1]


def test_an_archive_of_configs_only_has_one_empty_extent() -> None:
    raw = pack(header(configs=[Config("a.conf", b"x")]), [])
    (event,) = extents_of(scan(raw))
    assert event.extent.runs == ()
    assert event.extent.data_bytes == 0
    assert len(raw) == HEADER_BYTES + 512 + EXTENT_HEADER_BYTES


def test_flushing_twice_adds_nothing() -> None:
    packer: Packer[None] = Packer(UUID)
    assert packer.add(1, 0, 1, b"", b"", None) == []
    assert len(packer.flush()) == 1
    assert packer.flush() == []


def test_a_run_that_fills_extents_exactly_leaves_nothing_to_flush() -> None:
    packer: Packer[None] = Packer(UUID, 4)
    assert sum(e.extents for e in packer.add(1, 0, 8, b"", b"", None)) == 2
    assert packer.flush() == []


def test_the_payload_is_not_copied() -> None:
    payload = bytes(range(256)) * 256 * 3
    packer: Packer[None] = Packer(UUID, 2)
    (extent,) = packer.add(1, 0, 3, b"\xff" * 6, payload, None)
    (view,) = extent.buffers[1:]
    assert isinstance(view, memoryview)
    assert view.obj is payload


def test_what_an_extent_says_it_holds_is_what_its_buffers_hold() -> None:
    run = Run(7, 5, (1, 0, FULL_MASK, 0x0101, 0))
    packer: Packer[str] = Packer(UUID, 2)
    extents = list(packer.add(7, 5, 5, run.raw_masks, run.payload, "note"))
    extents += packer.flush()
    assert b"".join(bytes(p) for e in extents for *_, p in e.clusters) == run.payload
    assert b"".join(m for e in extents for *_, m, _ in e.clusters) == run.raw_masks
    assert [(d, f, n) for e in extents for d, f, n, *_ in e.clusters] == [
        (7, 5, 2),
        (7, 7, 2),
        (7, 9, 1),
    ]
    assert [e.total_bytes for e in extents] == [sum(map(len, e.buffers)) for e in extents]
    assert [e.notes for e in extents] == [{}, {}, {7: "note"}]


def test_a_note_comes_with_the_extent_in_which_its_run_ends() -> None:
    packer: Packer[int] = Packer(UUID, 4)
    extents: list[PackedExtent[int]] = []
    for note, (dev_id, first, count) in enumerate([(1, 0, 3), (2, 0, 3), (1, 3, 1), (2, 3, 1)]):
        extents += packer.add(dev_id, first, count, b"", b"", note)
    assert [extent.notes for extent in extents] == [{1: 0}, {2: 3, 1: 2}]


def test_the_longest_run_of_zeroes_that_a_message_holds_is_a_short_list() -> None:
    packer: Packer[None] = Packer(UUID)
    extents = packer.add(1, 0, MAX_RUN_CLUSTERS, b"", b"", None)
    first = extents[0]
    assert first.total_bytes == first.extents * EXTENT_HEADER_BYTES <= 32 << 10
    assert first.clusters == [(1, 0, 58 * first.extents, b"", memoryview(b""))]
    assert len(extents) < 300
    assert sum(extent.extents for extent in extents) == MAX_RUN_CLUSTERS // 58


@pytest.mark.parametrize("slots", [1, 4, 58, 59])
@pytest.mark.parametrize("first", [0, 7, MAX_CLUSTERS - 59 * 3])
def test_headers_of_zeroes_made_together_are_those_made_one_by_one(slots: int, first: int) -> None:
    words = [slot_word(0, 254, first + n) for n in range(3 * slots)]
    one_by_one = [
        encode_extent_header(UUID, words[at : at + slots], 0) for at in range(0, 3 * slots, slots)
    ]
    assert encode_zero_extents(UUID, words[0], slots, 3) == b"".join(one_by_one)


def test_zeroes_behind_other_clusters_first_fill_their_extent() -> None:
    packer: Packer[str] = Packer(UUID, 4)
    extents = list(packer.add(1, 0, 1, b"\0\1", bytes(4096), "data"))
    extents += packer.add(2, 0, 12, b"", b"", "zeroes")
    extents += packer.flush()
    assert [e.extents for e in extents] == [1, 2, 1]
    assert [e.notes for e in extents] == [{1: "data"}, {}, {2: "zeroes"}]


def test_the_last_possible_cluster_number_is_packed() -> None:
    raw = b"".join(pack_extents(UUID, [Run(254, MAX_CLUSTERS - 1, (FULL_MASK,))]))
    head = header([Device(254, "a", MAX_CLUSTERS * CLUSTER_BYTES)])
    (cluster,) = clusters_of(scan(pack(head, [])[: HEADER_BYTES + 512] + raw))
    assert cluster.num == MAX_CLUSTERS - 1
    assert cluster.dev_id == 254


@pytest.mark.parametrize(
    ("dev_id", "first", "count", "masks", "data_bytes"),
    [
        pytest.param(0, 0, 1, b"", 0, id="dev_id 0"),
        pytest.param(255, 0, 1, b"", 0, id="dev_id 255"),
        pytest.param(256, 0, 1, b"", 0, id="dev_id that spills over"),
        pytest.param(1, -1, 1, b"", 0, id="cluster before the start"),
        pytest.param(1, MAX_CLUSTERS, 1, b"", 0, id="cluster number of 33 bits"),
        pytest.param(1, MAX_CLUSTERS - 1, 2, b"", 0, id="run out of the range"),
        pytest.param(1, 0, 0, b"", 0, id="empty run"),
        pytest.param(1, 0, -1, b"", 0, id="negative run"),
        pytest.param(1, 0, 2, b"\0\1", 4096, id="masks too short"),
        pytest.param(1, 0, 1, b"\0\1\0\1", 8192, id="masks too long"),
        pytest.param(1, 0, 1, b"\0\1", 4095, id="data too short"),
        pytest.param(1, 0, 1, b"\0\1", 4097, id="data too long"),
        pytest.param(1, 0, 1, b"", 4096, id="data without masks"),
        pytest.param(1, 0, 200, b"\xff\xff" * 200, 199 * 65536, id="data short after an extent"),
    ],
)
def test_what_an_extent_cannot_hold_is_refused_before_anything_is_packed(
    dev_id: int, first: int, count: int, masks: bytes, data_bytes: int
) -> None:
    packer: Packer[None] = Packer(UUID)
    with pytest.raises(LimitError):
        packer.add(dev_id, first, count, masks, bytes(data_bytes), None)
    (extent,) = packer.flush()
    assert extent.clusters == []


def test_a_payload_that_is_no_view_of_bytes_is_refused() -> None:
    packer: Packer[None] = Packer(UUID)
    with pytest.raises(LimitError):
        packer.add(1, 0, 1, b"\0\1", memoryview(bytes(4096)).cast("I"), None)


@pytest.mark.parametrize("slots", [0, -1, 60])
def test_a_number_of_slots_that_no_extent_has_is_refused(slots: int) -> None:
    with pytest.raises(LimitError):
        Packer(UUID, slots)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_uuid_of_other_than_16_bytes_is_refused_by_the_packer(size: int) -> None:
    with pytest.raises(LimitError):
        Packer(bytes(size))

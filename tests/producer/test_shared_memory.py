# SPDX-License-Identifier: Apache-2.0
"""The ring of memory that pieces are read into."""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.archiver.job.server import map_shared
from vmapipe.producer.shared_memory import RING_BYTES, Ring
from vmapipe.protocol import limits

# Behind the two hot places.
_RING_AT = 2 * limits.MAX_PAYLOAD_BYTES


@pytest.fixture(scope="module")
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.close()


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 20)), max_size=200))
def test_no_byte_is_given_out_twice_before_it_is_acknowledged(
    ring: Ring, steps: list[tuple[bool, int]]
) -> None:
    held: deque[tuple[int, range]] = deque()
    seq = 0
    for free, length in steps:
        if free and held:
            ring.release(held.popleft()[0])
        position = ring.take(length)
        if position is None:
            continue
        taken = range(position, position + length)
        assert taken.stop <= RING_BYTES
        for _, other in held:
            assert taken.stop <= other.start or other.stop <= taken.start
        seq += 1
        ring.hold(seq, position, length)
        held.append((seq, taken))
    ring.release(seq)


@pytest.mark.parametrize("piece", [1 << 16, 1 << 18, 1 << 20, 2 << 20, 4 << 20])
def test_room_for_a_piece_is_left_while_an_archiver_holds_back_what_it_may(piece: int) -> None:
    ring = Ring()
    ring.fit(piece)
    held_back = 58 * 65536 + piece + 512 * 1024
    size = 4 * 65536 * (RING_BYTES // (4 * 65536))
    for start in range(0, size, 4096 * 37):
        ring.release(1 << 61)
        _fill_hot_places(ring)
        # Bring the ring to an arbitrary position first.
        if not _at(ring, start):
            continue
        total = 0
        while total < held_back:
            position = ring.take(65536)
            assert position is not None, (start, total)
            ring.hold(3, position, 65536)
            total += 65536
        assert ring.take(piece) is not None, start
    ring.close()


def test_a_piece_goes_to_the_same_memory_as_long_as_the_one_before_last_is_acknowledged() -> None:
    ring = Ring()
    used = set()
    for seq in range(1, 100):
        position = ring.take(4 << 20)
        assert position is not None
        used.add(position)
        ring.hold(seq, position, 4 << 20)
        ring.release(seq - 1)
    assert len(used) == 2
    ring.close()


def _fill_hot_places(ring: Ring) -> None:
    """Behind them the ring begins; it alone has to do."""
    while ring.take(1) != _RING_AT:
        ring.hold(1 << 62, ring.take(1) or 0, 1)


def _at(ring: Ring, start: int) -> bool:
    """Nothing is held but a byte at `start`; False where the ring ends before that."""
    first = ring.take(max(1, start))
    if first is None or first + start >= RING_BYTES - 1:
        return False
    ring.hold(1, first, max(1, start))
    position = ring.take(1)
    if position is None:
        return False
    ring.hold(2, position, 1)
    ring.release(1)
    return True


def test_an_archiver_maps_the_ring_and_sees_what_is_read_into_it() -> None:
    ring = Ring()
    shared = map_shared(ring.shared_at)
    assert shared is not None
    ring.view[1000:1003] = b"abc"
    assert bytes(shared[1000:1003]) == b"abc"
    assert shared.readonly
    ring.close()
    assert bytes(shared[1000:1003]) == b"abc"


def test_only_sealed_memory_of_a_process_is_mapped(tmp_path: os.PathLike[str]) -> None:
    file = os.path.join(tmp_path, "file")
    with open(file, "wb") as handle:
        handle.write(b"x" * 4096)
        assert map_shared(file) is None
        assert map_shared(f"/proc/{os.getpid()}/fd/{handle.fileno()}") is None
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    offer = f"/proc/{os.getpid()}/fd/{unsealed}"
    assert map_shared(offer) is None
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert map_shared(offer) is not None
    assert map_shared("../" + offer) is None
    os.close(unsealed)
    assert map_shared(offer) is None
    for odd in ("", "/proc/self/fd/0", "/etc/passwd", "/proc/1/fd/0"):
        assert map_shared(odd) is None

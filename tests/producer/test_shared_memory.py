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
from vmapipe.producer.shared_memory import RING_BYTES, PieceAllocator, Ring


@pytest.fixture(scope="module")
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.close()


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 20)), max_size=200))
def test_no_byte_is_given_out_twice_before_it_is_acknowledged(
    ring: Ring, steps: list[tuple[bool, int]]
) -> None:
    held: deque[range] = deque()
    for free, length in steps:
        if free and held:
            ring.free(held.popleft().start)
        position = ring.take(length)
        if position is None:
            continue
        taken = range(position, position + length)
        assert taken.stop <= RING_BYTES
        for other in held:
            assert taken.stop <= other.start or other.stop <= taken.start
        ring.hold(position, length)
        held.append(taken)
    for taken in held:
        ring.free(taken.start)


@pytest.mark.parametrize("piece", [1 << 16, 1 << 18, 1 << 20, 2 << 20, 4 << 20])
def test_room_for_a_piece_is_left_while_an_archiver_holds_back_what_it_may(piece: int) -> None:
    held_back = 58 * 65536 + piece + 512 * 1024
    size = 4 * 65536 * (RING_BYTES // (4 * 65536))
    for start in range(0, size, 4096 * 37):
        # The ring alone, without the hot places, at an arbitrary position.
        ring = PieceAllocator(hot_places=0)
        ring.fit(piece)
        if not _at(ring, start):
            continue
        total = 0
        while total < held_back:
            position = ring.take(65536)
            assert position is not None, (start, total)
            ring.hold(position, 65536)
            total += 65536
        assert ring.take(piece) is not None, start


def test_a_piece_goes_to_the_same_memory_as_long_as_the_one_before_last_is_acknowledged() -> None:
    ring = PieceAllocator()
    used = []
    for number in range(100):
        position = ring.take(4 << 20)
        assert position is not None
        used.append(position)
        ring.hold(position, 4 << 20)
        if number:
            ring.free(used[-2])
    assert len(set(used)) == 2


def _at(ring: PieceAllocator, start: int) -> bool:
    """Nothing is held but a byte at `start`; False where the ring ends before that."""
    first = ring.take(max(1, start))
    if first is None or first + start >= RING_BYTES - 1:
        return False
    ring.hold(first, max(1, start))
    position = ring.take(1)
    if position is None:
        return False
    ring.hold(position, 1)
    ring.free(first)
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

# SPDX-License-Identifier: Apache-2.0
"""Zero blocks of a piece of disk, found fast, and the masks that record them."""

from __future__ import annotations

import functools
import re

from vmapipe.clusters.sizes import BLOCK_BYTES, BLOCKS_PER_CLUSTER, CLUSTER_BYTES, FULL_MASK

# Bytearrays, because they compare themselves with any buffer, in place and with
# memcmp: 37 GiB/s. Bytes would need a copy (20 GiB/s), and memoryviews compare
# item by item. 64 KiB stay in the processor's cache.
_ZEROES = (bytearray(CLUSTER_BYTES), bytearray(BLOCK_BYTES))
_FULL = FULL_MASK.to_bytes(2, "big")
_ZERO_BYTES = re.compile(rb"\0+")
_ONES = re.compile("1+")


Data = bytes | bytearray | memoryview


def cluster_masks(data: Data, length: int) -> bytes:
    """The masks of the first `length` bytes of `data`: big-endian 16 bits a cluster.

    Bit 0 is a cluster's first block. `length` is a multiple of 4096 (pad a
    partial block with zeroes). Empty when all of it is zero.
    """
    view = memoryview(data)
    # One look at the first byte of every block settles most of them: where it
    # is not zero, neither is the block.
    sample = bytes(view[0:length:BLOCK_BYTES])
    marks = bytearray(b"1" * len(sample))
    if 0 in sample:
        _mark_zero_blocks(marks, view, list(map(re.Match.span, _ZERO_BYTES.finditer(sample))))
    if 0x30 not in marks and not length % CLUSTER_BYTES:
        return _FULL * (length // CLUSTER_BYTES)
    bits = int(marks[::-1] or b"0", 2)
    return _swapped(bits.to_bytes(-(-length // CLUSTER_BYTES) * 2, "little")) if bits else b""


def _mark_zero_blocks(marks: bytearray, view: memoryview, todo: list[tuple[int, int]]) -> None:
    """Put "0" where a block is zero, in the ranges [first, stop) of blocks that `todo` has."""
    zero_block = _ZEROES[-1]
    while todo:
        first, stop = todo.pop()
        if stop - first <= BLOCKS_PER_CLUSTER:
            for block in range(first, stop):
                if zero_block == view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]:
                    marks[block] = 0x30
        elif is_zero(view[first * BLOCK_BYTES :], (stop - first) * BLOCK_BYTES):
            marks[first:stop] = b"0" * (stop - first)
        else:
            # The comparison ended at the first difference: looking again costs little.
            middle = (first + stop) // 2
            todo += (first, middle), (middle, stop)


def is_zero(data: Data, length: int) -> bool:
    """Return whether the first `length` bytes are all zero."""
    view = memoryview(data)[:length]
    at = 0
    for zeroes in _ZEROES:
        size = len(zeroes)
        while at + size <= length:
            if zeroes != view[at : at + size]:
                return False
            at += size
    return not any(view[at:])


def _swapped(words: bytes) -> bytes:
    """16-bit words with their two bytes the other way round."""
    out = bytearray(len(words))
    out[0::2], out[1::2] = words[1::2], words[0::2]
    return bytes(out)


def nonzero_pieces(masks: bytes) -> list[tuple[int, int]]:
    """The non-zero blocks as (offset, length) in bytes, neighbours merged, in order."""
    if masks and masks == _FULL * (len(masks) // 2):
        return [(0, len(masks) // 2 * CLUSTER_BYTES)]
    runs = bit_runs(int.from_bytes(_swapped(masks), "little"))
    return [(first * BLOCK_BYTES, count * BLOCK_BYTES) for first, count in runs]


def bit_runs(bits: int) -> list[tuple[int, int]]:
    """Return the runs of set bits as (first bit, count), lowest first."""
    # One pass over a text is quicker than shifts of a long number.
    text = f"{bits:b}"[::-1]
    return [(ones.start(), ones.end() - ones.start()) for ones in _ONES.finditer(text)]


@functools.lru_cache(maxsize=1024)
def mask_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """Return the stored blocks of one cluster as runs (first block, count).

    Kept for a thousand masks: a disk has few different ones beside the full and the empty.
    """
    return tuple(bit_runs(mask))


def collect(data: Data, masks: bytes) -> bytes | memoryview:
    """The non-zero blocks back to back: a view where they already are, else one copy."""
    pieces = nonzero_pieces(masks)
    view = memoryview(data)
    if len(pieces) == 1:
        at, length = pieces[0]
        return view[at : at + length]
    return b"".join(view[at : at + length] for at, length in pieces)


def compact(view: memoryview, masks: bytes) -> int:
    """Move the non-zero blocks to the front of `view`; return their length in bytes."""
    end = 0
    for at, length in nonzero_pieces(masks):
        if at != end:
            view[end : end + length] = view[at : at + length]
        end += length
    return end

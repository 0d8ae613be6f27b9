# SPDX-License-Identifier: Apache-2.0
"""Ranges of a read, held against a set of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmapipe.protocol.nbd.client_transfer import AnsweredBytes

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=40)


@given(RANGES)
def test_a_range_is_taken_exactly_when_no_byte_of_it_was_there(
    ranges: list[tuple[int, int]],
) -> None:
    coverage = AnsweredBytes()
    model: set[int] = set()
    for start, length in ranges:
        new = set(range(start, start + length))
        assert coverage.add(start, length) == model.isdisjoint(new)
        if model.isdisjoint(new):
            model |= new
        assert coverage.covered_bytes == len(model)

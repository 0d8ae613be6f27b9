# SPDX-License-Identifier: Apache-2.0
"""What fuzzing has found worth keeping is tried again at every change; and chance goes on a little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_finds_no_defect(name: str) -> None:
    inputs = corpus.read(name)
    assert len(inputs) > 8  # else it was lost
    for data in inputs:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300))
def test_neither_does_chance(name: str, data: bytes) -> None:
    TARGETS[name](data)

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import uuid

from vmapipe.runtime.uuids import random_uuid, uuid_text


def test_a_new_uuid_is_a_random_one_and_none_comes_twice() -> None:
    made = [random_uuid() for _ in range(64)]
    assert len(set(made)) == len(made)
    for raw in made:
        read = uuid.UUID(bytes=raw)
        assert (read.variant, read.version) == (uuid.RFC_4122, 4)


def test_a_uuid_is_written_as_pythons_own_module_writes_it() -> None:
    for raw in (bytes(16), bytes(range(16)), b"\xff" * 16):
        assert uuid_text(raw) == str(uuid.UUID(bytes=raw))

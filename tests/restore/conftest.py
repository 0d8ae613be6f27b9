# SPDX-License-Identifier: Apache-2.0
"""What has to be there before the first of these tests."""

from __future__ import annotations

import pytest
import zmq


@pytest.fixture(scope="session", autouse=True)
def _zero_copy_is_ready() -> None:
    """pyzmq starts a thread, with descriptors, at the first message it does not copy, and keeps it."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as two:
        one.bind("inproc://ready")
        two.connect("inproc://ready")
        one.send(bytes(1 << 17), copy=False)
        two.recv()

# SPDX-License-Identifier: Apache-2.0
"""What the command line needs of ZeroMQ: new keys. The only file of this room that knows it."""

from __future__ import annotations

import zmq

from vmapipe.runtime.keys import KeyPair


def new_pair() -> KeyPair:
    """A pair of CURVE keys from the system's randomness."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())

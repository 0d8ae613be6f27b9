# SPDX-License-Identifier: Apache-2.0
"""Every limit of the wire, checked before anything is unpacked (docs/wire-protocol.md)."""

from __future__ import annotations

from vmapipe.clusters.sizes import CLUSTER_BYTES

VERSION = 1

MAX_DEV_ID = 254

# A run carries at most this much data: larger messages were not quicker, and
# each costs a buffer on both sides.
MAX_PAYLOAD_BYTES = 64 * CLUSTER_BYTES
# A run of zero clusters has no data, but the archive needs 8 bytes a cluster:
# this many make 8 MiB of archive out of one message.
MAX_RUN_CLUSTERS = 1 << 20
# Masks of a run that has data: 32768 clusters, 2 GiB of disk, are far more
# than 64 clusters of data need.
MAX_MASKS_BYTES = 64 * 1024
# Of a message of scattered clusters: more than can be full of data. Each is a
# piece of its own for the writer of the archive.
MAX_SCATTERED_CLUSTERS = 256
# A page of digests of the base's clusters: 32 KiB of them, for 128 MiB of disk.
MAX_WANTED_CLUSTERS = 2048
CLUSTER_DIGEST_BYTES = 16
DIGEST_KEY_BYTES = 32
# What one message counts against the credit beside its data: see `charge`.
CHARGE_PER_FRAME = 64
CHARGE_PER_CLUSTER = 8

# The largest charge of a message must be at least this, or a full cluster
# could never be sent.
MIN_FRAME_CHARGE = CHARGE_PER_FRAME + CHARGE_PER_CLUSTER + CLUSTER_BYTES
# The smallest window of an archiver: one full cluster, with room for a second.
MIN_WINDOW_BYTES = 2 * MIN_FRAME_CHARGE

# Control messages are small; 64 KiB holds a long reason and then some.
MAX_CONTROL_BYTES = 64 * 1024
# A data message's number: msgpack needs at most 9 bytes.
MAX_NUMBER_PART_BYTES = 16
# A cluster, or a run's masks, with the array around it.
MAX_FRAME_PART_BYTES = CLUSTER_BYTES + 64
MAX_NAME_BYTES = 1024
MAX_REASON_CHARS = 4096
MAX_ARRAY_ITEMS = 8
MAX_MAP_ITEMS = 64
UUID_BYTES = 16
# An hour of silence is no heartbeat any more; every timer can hold it.
MAX_HEARTBEAT_S = 3600
# A day: no cable is waited for longer, and a guest's old data waits meanwhile.
MAX_RECONNECT_S = 86400


def charge(clusters: int, data_bytes: int) -> int:
    """Return what a frame takes from the credit, in bytes: what it may cost the archiver to hold."""
    return CHARGE_PER_FRAME + CHARGE_PER_CLUSTER * clusters + data_bytes


# Until WELCOME has told the archiver's own limit, a peer that is silent for so
# long is dead: long enough for a loaded machine, short enough to be noticed.
GREETING_HEARTBEAT_S = 30

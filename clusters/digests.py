# SPDX-License-Identifier: Apache-2.0
"""Digests of clusters, by which an unchanged cluster is known: keyed SHA-256. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from vmapipe.clusters.sizes import BLOCK_BYTES

DIGEST_BYTES = 16
#: Nothing is known of the cluster. No cluster has this digest, but by a chance of 1 to 2^128.
UNKNOWN = bytes(DIGEST_BYTES)


def cluster_digester(key: bytes) -> Callable[[bytes, memoryview], bytes]:
    """Return the function that makes the digest of a cluster out of its mask (2 bytes) and its stored blocks.

    SHA-256, because a guest must not be able to make two clusters of one digest; with a
    key that the guest does not know, 16 bytes are enough (docs/decisions/0027-cluster-digests.md).
    """
    keyed = hashlib.sha256(key)

    def digest(mask: bytes, blocks: memoryview) -> bytes:
        hasher = keyed.copy()
        hasher.update(mask)
        hasher.update(blocks)
        return hasher.digest()[:DIGEST_BYTES]

    return digest


def cluster_digests(
    digest: Callable[[bytes, memoryview], bytes], masks: bytes, blocks: memoryview
) -> list[bytes]:
    """The digests of consecutive clusters: `masks` has two bytes for each; UNKNOWN where all is zero."""
    found, at = [], 0
    for index in range(0, len(masks), 2):
        mask = masks[index : index + 2]
        stop = at + int.from_bytes(mask, "big").bit_count() * BLOCK_BYTES
        found.append(digest(mask, blocks[at:stop]) if stop > at else UNKNOWN)
        at = stop
    return found

# SPDX-License-Identifier: Apache-2.0
"""Which clusters of a disk that is read as a whole are as in the base: by the digests that the archiver has. Pure."""

from __future__ import annotations

from typing import NamedTuple

from vmapipe.clusters.digests import DIGEST_BYTES, UNKNOWN, cluster_digester, cluster_digests
from vmapipe.clusters.sizes import BLOCK_BYTES
from vmapipe.producer.runs import Run
from vmapipe.protocol import limits

# The page that is needed now and the next one are asked for: half a disk's second, and no more
# than the answer's way takes. What lies behind is forgotten.
_AHEAD_PAGES = 2
_PAGE = limits.MAX_WANTED_CLUSTERS


class UnchangedClusters(NamedTuple):
    """Consecutive clusters that are as in the base."""

    first_cluster: int
    clusters: int


class SinceBase:
    """Compares what was read with the digests of the base; a disk is read from its begin to its end."""

    def __init__(self, key: bytes, clusters: int) -> None:
        self._digest = cluster_digester(key)
        self._clusters = clusters
        self._pages: dict[int, bytes] = {}
        self._asked: set[int] = set()

    def wants(self, first: int) -> list[tuple[int, int]]:
        """Return what to ask for now, as (first cluster, count), to go on from cluster `first`."""
        page = first // _PAGE
        for old in [number for number in self._pages if number < page]:
            del self._pages[old]
        last = min(page + _AHEAD_PAGES, -(-self._clusters // _PAGE))
        new = [n for n in range(page, last) if n not in self._pages and n not in self._asked]
        self._asked.update(new)
        return [(n * _PAGE, min(_PAGE, self._clusters - n * _PAGE)) for n in new]

    def take(self, first: int, digests: bytes) -> None:
        """An answer. One that was not asked for, or is not whole, is as if nothing were known."""
        page = first // _PAGE
        if page in self._asked and first % _PAGE == 0:
            self._asked.discard(page)
            whole = min(_PAGE, self._clusters - first) * DIGEST_BYTES
            self._pages[page] = digests if len(digests) == whole else bytes(whole)

    def ask_again(self) -> None:
        """What was asked for and has not come was lost with its connection."""
        self._asked.clear()

    def split(self, run: Run, memory: memoryview) -> list[Run | UnchangedClusters] | None:
        """Cut a run into changed clusters and unchanged ones; None: digests that it needs have not come."""
        if not run.masks:
            return [run]
        end = run.first_cluster + run.clusters
        if any(
            p not in self._pages for p in range(run.first_cluster // _PAGE, (end - 1) // _PAGE + 1)
        ):
            return None
        blocks = memory[run.position : run.position + run.length]
        digests = cluster_digests(self._digest, run.masks, blocks)
        same = [
            digest != UNKNOWN and digest == self._known(cluster)
            for cluster, digest in enumerate(digests, run.first_cluster)
        ]
        parts: list[Run | UnchangedClusters] = []
        index, position = 0, run.position
        while index < run.clusters:
            stop = index + 1
            while stop < run.clusters and same[stop] == same[index]:
                stop += 1
            masks = run.masks[2 * index : 2 * stop]
            length = int.from_bytes(masks, "big").bit_count() * BLOCK_BYTES
            first = run.first_cluster + index
            if same[index]:
                parts.append(UnchangedClusters(first, stop - index))
            else:
                parts.append(Run(first, stop - index, masks if length else b"", position, length))
            index, position = stop, position + length
        return parts

    def _known(self, cluster: int) -> bytes:
        at = cluster % _PAGE * DIGEST_BYTES
        return self._pages[cluster // _PAGE][at : at + DIGEST_BYTES]

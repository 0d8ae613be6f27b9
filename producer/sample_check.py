# SPDX-License-Identifier: Apache-2.0
"""A sample of what a running QEMU has not recorded as changed: what comes is compared with the base. Pure.

The archiver knows the digests of the base's clusters and is asked for those of the sample. One that differs
shows that QEMU's record is not the base's: nothing of it can be trusted then.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmapipe.clusters.digests import DIGEST_BYTES, UNKNOWN, cluster_digester, cluster_digests
from vmapipe.clusters.sizes import BLOCK_BYTES, CLUSTER_BYTES
from vmapipe.producer.runs import Run
from vmapipe.producer.since_base import UnchangedClusters
from vmapipe.runtime.errors import DoubtfulBase

# So many answers are under way: far less than fills a socket.
_UNDER_WAY = 256


class SampleCheck:
    """The sample of one disk. First it is told, in parts, and until then nothing of the disk is sent."""

    def __init__(self, name: str, *, is_awaited: bool) -> None:
        self._name = name
        self.is_told = not is_awaited
        self._digest = cluster_digester(b"")
        #: Those that have not come yet.
        self._left: set[int] = set()
        self._unasked: list[int] = []
        self._asked: set[int] = set()
        self._known: dict[int, bytes] = {}
        self._has_digests = False

    def set_key(self, key: bytes) -> None:
        """`key`: of the base's digests; empty: it has none."""
        self._has_digests = bool(key)
        self._digest = cluster_digester(key)

    def tell(self, clusters: Iterable[int], *, is_last: bool) -> None:
        """Some of the sample's clusters. Raises DoubtfulBase where nothing can be compared."""
        new = list(clusters)
        if new and not self._has_digests:
            raise DoubtfulBase(
                f"disk {self._name!r}: the base has no digests that a sample could be compared with"
            )
        self._left.update(new)
        self._unasked += new
        self.is_told = self.is_told or is_last

    @property
    def is_done(self) -> bool:
        """True when all of the sample has come, and was as in the base."""
        return self.is_told and not self._left

    def wants(self) -> list[int]:
        """Return the clusters whose digests are to be asked for now."""
        room = max(0, _UNDER_WAY - len(self._asked))
        new, self._unasked = self._unasked[:room], self._unasked[room:]
        self._asked.update(new)
        return new

    def take(self, first: int, digests: bytes) -> None:
        """An answer: one cluster's digest. What was not asked for is dropped."""
        if first in self._asked and len(digests) == DIGEST_BYTES:
            self._asked.discard(first)
            self._known[first] = digests

    def is_ready(self, first: int, count: int) -> bool:
        """Tell whether all is known that these clusters are to be compared with."""
        return all(n in self._known for n in self.sampled(first, count))

    def sampled(self, first: int, count: int) -> list[int]:
        """Return which of these clusters are in the sample."""
        end = first + count
        if count > len(self._left):
            return sorted(n for n in self._left if first <= n < end)
        return [n for n in range(first, end) if n in self._left]

    def compare_zeroes(self, cluster: int) -> None:
        """This cluster has come as zeroes. Raises DoubtfulBase where the base has something else."""
        self._compare(cluster, UNKNOWN)

    def split(self, run: Run, memory: memoryview) -> list[Run | UnchangedClusters]:
        """Cut a run that has come, so that what is as in the base need not be sent. Raises DoubtfulBase."""
        parts: list[Run | UnchangedClusters] = []
        masks = run.masks or bytes(2 * run.clusters)
        blocks = memory[run.position : run.position + run.length]
        digests = cluster_digests(self._digest, masks, blocks)
        start, position, at = run.first_cluster, run.position, run.position
        for index, digest in enumerate(digests):
            cluster = run.first_cluster + index
            mask = masks[2 * index : 2 * index + 2]
            length = int.from_bytes(mask, "big").bit_count() * BLOCK_BYTES
            if cluster in self._left and self._compare(cluster, digest):
                parts += self._run(run, masks, start, cluster, position, at)
                parts.append(UnchangedClusters(cluster, 1))
                start, position = cluster + 1, at + length
            at += length
        return parts + self._run(run, masks, start, run.first_cluster + run.clusters, position, at)

    def _run(
        self, run: Run, masks: bytes, start: int, stop: int, position: int, end: int
    ) -> list[Run | UnchangedClusters]:
        """Return clusters of the run as one of their own; none where there are none."""
        if start == stop:
            return []
        first = start - run.first_cluster
        own = masks[2 * first : 2 * (stop - run.first_cluster)]
        return [Run(start, stop - start, own if any(own) else b"", position, end - position)]

    def _compare(self, cluster: int, digest: bytes) -> bool:
        """Tell whether it need not be sent. Raises DoubtfulBase where it is not as in the base.

        A cluster of zeroes has the same digest as one of which the base knows nothing: it is sent.
        """
        if cluster not in self._left:
            return False
        known = self._known.pop(cluster)
        self._left.discard(cluster)
        if known != digest:
            raise DoubtfulBase(
                f"disk {self._name!r}: QEMU has not recorded that the cluster at offset "
                f"{cluster * CLUSTER_BYTES} has changed since the base, but it has: its record is wrong (was "
                "the disk shrunk and grown again, or its image replaced?)"
            )
        return known != UNKNOWN

# SPDX-License-Identifier: Apache-2.0
"""The largest message that is allowed is allowed with the bytes that encryption adds, too."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.machine import make_disk
from tests.network.place import Place
from vmapipe.archiver.job import job
from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.protocol import limits


def test_a_run_of_the_largest_payload_comes_through_encrypted(tmp_path: Path) -> None:
    # The window that one device gets; it must leave room for such a run.
    assert job.WINDOW_TOTAL_BYTES // 2 > limits.MAX_PAYLOAD_BYTES
    with ExitStack() as stack:
        place = Place(tmp_path, stack)
        place.disk = make_disk(
            tmp_path / "large.raw", "A" * (2 * limits.MAX_PAYLOAD_BYTES // CLUSTER_BYTES)
        )
        place.honest_job_succeeds()

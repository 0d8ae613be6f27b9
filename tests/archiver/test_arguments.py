# SPDX-License-Identifier: Apache-2.0
"""The options of an output, where nobody has said anything else."""

from __future__ import annotations

import argparse
import os

import pytest

from vmapipe.archiver.arguments import add_output_options
from vmapipe.archiver.outputs.base import MAX_THREADS


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (3, 3), (200, MAX_THREADS)])
def test_there_is_a_thread_for_each_core_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    assert parser.parse_args([]).threads == threads

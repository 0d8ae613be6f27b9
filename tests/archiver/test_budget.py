# SPDX-License-Identifier: Apache-2.0
"""What is bounded fits into the limit of descriptors, whatever that is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.archiver.listener.tcp import RESERVE, budget_of
from vmapipe.archiver.service.jobs import need_of
from vmapipe.runtime.errors import Failure

# As a service has at its start.
IN_USE = 24


@given(st.integers(0, 1 << 20))
def test_strangers_and_clients_leave_what_a_new_child_needs(limit: int) -> None:
    if limit < IN_USE + RESERVE + 24:
        with pytest.raises(Failure, match=f"needs {IN_USE + RESERVE + 24} or more"):
            budget_of(limit, IN_USE)
        return
    budget = budget_of(limit, IN_USE)
    inside = IN_USE + budget.authenticating + budget.silent + budget.unassigned + budget.rest
    assert inside + RESERVE <= limit
    # The acceptor: its own, strangers before and behind their first word, connections and pipes.
    acceptor = 10 + 2 * budget.greeting + 2 * budget.connections + 2 * budget.pipes
    assert acceptor <= limit
    assert min(budget) >= 1
    # One job of one disk fits at least.
    assert need_of(1).connections <= budget.jobs
    assert need_of(1).descriptors <= budget.rest


@pytest.mark.parametrize(("limit", "jobs"), [(1024, 2), (4096, 8), (65_536, 64)])
def test_jobs_of_sixty_disks_fit_beside_each_other(limit: int, jobs: int) -> None:
    budget, need = budget_of(limit, IN_USE), need_of(60)
    assert jobs * need.connections <= budget.jobs
    assert jobs * need.descriptors <= budget.rest

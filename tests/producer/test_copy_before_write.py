# SPDX-License-Identifier: Apache-2.0
"""Copy-before-write against a model in which every cluster is a value."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmapipe.producer.guard.copy_before_write import Copy, CopyBeforeWrite

TOP = 90


@dataclass
class Write:
    """A guest's write that has not happened yet."""

    value: int
    first: int
    clusters: int
    copies: list[Copy]
    waits: list[Copy] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    """Guests write whenever they may; the copies must show the disk as it was at the start."""

    @initialize(clusters=st.integers(1, TOP))
    def start(self, clusters: int) -> None:
        self.core = CopyBeforeWrite(clusters)
        self.disk = [0] * clusters
        self.backup: list[int | None] = [None] * clusters
        self.background: list[Copy] = []
        self.writes: list[Write] = []
        self.finished: set[int] = set()
        self.next_value = 1

    @rule(first=st.integers(0, TOP - 1), clusters=st.integers(1, 12))
    def a_guest_wants_to_write(self, first: int, clusters: int) -> None:
        first %= self.core.clusters
        clusters = min(clusters, self.core.clusters - first)
        plan = self.core.before_write(first, clusters)
        value, self.next_value = self.next_value, self.next_value + 1
        if plan is None:
            self.disk[first : first + clusters] = [value] * clusters
            return
        assert plan.copies or plan.waits
        self.writes.append(Write(value, first, clusters, plan.copies, plan.waits))

    @rule(most=st.integers(1, 16))
    def the_background_begins_a_copy(self, most: int) -> None:
        copy = self.core.next_background(most)
        if copy is not None:
            assert copy.clusters <= most
            self.background.append(copy)

    @precondition(lambda self: self.background)
    @rule(data=st.data())
    def the_background_ends_a_copy(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.background) - 1))
        self.copy(self.background.pop(index))

    @precondition(lambda self: any(write.copies for write in self.writes))
    @rule(data=st.data())
    def a_guest_ends_one_of_its_copies(self, data: st.DataObject) -> None:
        write = data.draw(st.sampled_from([write for write in self.writes if write.copies]))
        self.copy(write.copies.pop())

    @rule()
    def whoever_waits_for_nothing_writes(self) -> None:
        for write in list(self.writes):
            if not write.copies and all(id(copy) in self.finished for copy in write.waits):
                self.writes.remove(write)
                end = write.first + write.clusters
                self.disk[write.first : end] = [write.value] * write.clusters

    def copy(self, copy: Copy) -> None:
        for num in range(copy.first, copy.first + copy.clusters):
            assert self.backup[num] is None, "copied twice"
            self.backup[num] = self.disk[num]
        self.core.copied(copy)
        self.finished.add(id(copy))
        # An id must not be given to another copy while somebody waits for it.
        self.keep = [*getattr(self, "keep", []), copy]

    @invariant()
    def the_backup_shows_the_disk_as_it_was(self) -> None:
        if hasattr(self, "core"):
            assert all(value in (None, 0) for value in self.backup)
            assert self.core.done == sum(value is not None for value in self.backup)

    def teardown(self) -> None:
        """Everybody can always go on to the end: nobody waits in a circle."""
        if not hasattr(self, "core"):
            return
        while self.background or self.writes:
            before = (len(self.background), len(self.writes), self.core.done)
            for copy in self.background:
                self.copy(copy)
            self.background = []
            for write in self.writes:
                while write.copies:
                    self.copy(write.copies.pop())
            self.whoever_waits_for_nothing_writes()
            assert before != (len(self.background), len(self.writes), self.core.done)
        while (last := self.core.next_background(7)) is not None:
            self.copy(last)
        assert self.core.complete
        assert self.backup == [0] * self.core.clusters


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_a_write_waits_for_exactly_the_copies_that_it_touches() -> None:
    core = CopyBeforeWrite(100)
    left, right = core.next_background(10), core.next_background(10)
    assert left
    assert right
    plan = core.before_write(9, 1)
    assert plan is not None
    assert (plan.copies, plan.waits) == ([], [left])
    plan = core.before_write(18, 4)
    assert plan is not None
    assert plan.waits == [right]
    assert [(copy.first, copy.clusters) for copy in plan.copies] == [(20, 2)]
    core.copied(left)
    assert core.before_write(0, 10) is None


def test_a_write_over_clusters_of_every_state_copies_only_what_nobody_has() -> None:
    core = CopyBeforeWrite(100)
    first = core.next_background(5)
    assert first is not None
    core.copied(first)
    middle = core.before_write(10, 3)
    assert middle is not None
    plan = core.before_write(0, 20)
    assert plan is not None
    assert plan.waits == middle.copies
    assert [(copy.first, copy.clusters) for copy in plan.copies] == [(5, 5), (13, 7)]


def test_a_large_disk_costs_at_most_one_bit_a_cluster_and_what_is_done_is_passed_over_quickly() -> (
    None
):
    clusters = 1 << 26  # 4 TiB
    core = CopyBeforeWrite(clusters)
    most = core.next_background(clusters - 1)
    assert most is not None
    core.copied(most)
    last = core.next_background(32)
    assert last is not None
    assert (last.first, last.clusters) == (clusters - 1, 1)
    assert core.next_background(32) is None

# SPDX-License-Identifier: Apache-2.0
"""A network that breaks: real processes, and a cable in the test's hands."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machine import end_of, make_disk, started
from tests.network.cable import Cable, cable_to
from tests.network.place import Place, lose_connections, until

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack, "--reconnect-limit", "30")


@pytest.fixture
def cable(place: Place) -> Iterator[Cable]:
    with cable_to(place.endpoint) as cable:
        # A disk takes some seconds: time for something to happen meanwhile.
        cable.bytes_s = 4 * MIB
        make_disk(place.disk, ("A" * 16 + "0h") * 8)
        yield cable


@pytest.mark.parametrize("seed", range(3))
def test_connections_that_end_at_any_moment_cost_nothing(
    place: Place, cable: Cable, seed: int
) -> None:
    chance = random.Random(seed)
    with started(*place.producer(place.client, at=cable.endpoint)) as producer:
        for _ in range(3):
            lose_connections(cable, producer, chance.randrange(2 * MIB))
        assert end_of(producer)[0] == 0
    place.archive_is_good()
    assert "connected again" in "\n".join(place.said)


def test_a_late_and_noisy_network_costs_time_and_nothing_else(place: Place, cable: Cable) -> None:
    """Noise ends a connection: CURVE finds it, and the rest is sent over the next one."""
    cable.delay_s = 0.02
    with started(*place.producer(place.client, at=cable.endpoint)) as producer:
        until(lambda: cable.carried_bytes > MIB, producer)
        for _ in range(3):
            connections, cable.noise = cable.connections, 1.0
            until(lambda c=connections: cable.connections > c, producer)  # type: ignore[misc]
            cable.noise = 0.0
        assert end_of(producer)[0] == 0
    place.archive_is_good()


def test_done_is_told_again_to_one_who_could_not_hear_it(place: Place, cable: Cable) -> None:
    with started(*place.producer(place.client, at=cable.endpoint)) as producer:
        until(lambda: cable.carried_bytes > MIB, producer)
        cable.bytes_s = 0.0
        cable.backwards = False
        place.line("stored")
        cable.drop()
        cable.backwards, cable.refusing = True, False
        assert end_of(producer)[0] == 0
    place.archive_is_good()


def test_a_cut_beyond_the_limit_fails_the_job_on_both_sides_with_the_same_words(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        place = Place(tmp_path, stack, "--reconnect-limit", "2", "--heartbeat", "1")
        cable = stack.enter_context(cable_to(place.endpoint))
        cable.bytes_s = 4 * MIB
        make_disk(place.disk, "A" * 200)
        with started(*place.producer(place.client, at=cable.endpoint)) as producer:
            until(lambda: cable.carried_bytes > MIB, producer)
            cable.cut = True
            words = "device 'disk.raw': the connection was lost for 2 s"
            code, text = end_of(producer)
            assert (code, text.splitlines()[-1]) == (1, f"vmapipe producer: {words}")
            code, text = end_of(place.archiver)
            assert (code, text.splitlines()[-1]) == (1, f"vmapipe archiver: {words}")
        place.nothing_is_stored()


def test_an_archiver_that_was_started_again_is_no_archiver_that_came_back(
    place: Place, cable: Cable
) -> None:
    with started(*place.producer(place.client, at=cable.endpoint)) as producer:
        until(lambda: cable.carried_bytes > MIB, producer)
        place.archiver.kill()
        place.archiver.wait()
        (place.folder / "vm.vma.partial").unlink()
        place.start_archiver(place.endpoint)
        code, text = end_of(producer)
        assert code == 1
        assert "[unknown-session]" in text.splitlines()[-1]
        assert "begin the backup anew" in text.splitlines()[-1]
    place.archiver.send_signal(signal.SIGTERM)
    assert end_of(place.archiver)[0] == 143
    place.nothing_is_stored()


def test_a_producer_that_was_started_again_is_no_producer_that_came_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = Place(tmp_path, stack, "--reconnect-limit", "4", "--heartbeat", "1")
        cable = stack.enter_context(cable_to(place.endpoint))
        cable.bytes_s = 4 * MIB
        make_disk(place.disk, "A" * 200)
        # Another one is started already, and gets through when the first is gone: starting takes
        # a busy machine longer than the limit.
        late = stack.enter_context(cable_to(place.endpoint))
        late.cut = True
        second = stack.enter_context(started(*place.producer(place.client, at=late.endpoint)))
        assert second.stderr is not None
        assert b"reading" in second.stderr.readline()
        with started(*place.producer(place.client, at=cable.endpoint)) as producer:
            until(lambda: cable.carried_bytes > MIB, producer)
            producer.kill()
        late.cut = False
        code, text = end_of(second)
        assert (code, "[restarted]" in text.splitlines()[-1]) == (1, True), text
        code, text = end_of(place.archiver)
        words = "device 'disk.raw': the connection was lost for 4 s"
        assert (code, text.splitlines()[-1]) == (1, f"vmapipe archiver: {words}")
        place.nothing_is_stored()


@pytest.mark.slow
@pytest.mark.parametrize("cut_s", [1, 10, 25])
def test_a_cable_that_is_pulled_for_a_while_costs_nothing(
    place: Place, cable: Cable, cut_s: int
) -> None:
    with started(*place.producer(place.client, at=cable.endpoint)) as producer:
        until(lambda: cable.carried_bytes > 2 * MIB, producer)
        cable.cut = True
        time.sleep(cut_s)
        cable.cut = False
        assert end_of(producer)[0] == 0
    place.archive_is_good()

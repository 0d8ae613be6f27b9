# SPDX-License-Identifier: Apache-2.0
"""One session with the archiver: credit, acknowledgements, heartbeats, and their waits."""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from vmapipe.clusters.sizes import cluster_count
from vmapipe.producer.connection import ArchiverConnection
from vmapipe.producer.runs import Run
from vmapipe.producer.shared_memory import Ring
from vmapipe.producer.since_base import SinceBase, UnchangedClusters
from vmapipe.protocol import limits
from vmapipe.protocol.errors import connection_lost
from vmapipe.protocol.schema import Part
from vmapipe.protocol.transfer import (
    Abort,
    Done,
    Grant,
    Have,
    Refuse,
    Resumed,
    SharedCluster,
    scattered_bytes,
)
from vmapipe.protocol.transfer_state import ProducerSide, ProducerState
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.logs import DEBUG, TRACE, Trace, shown

_log = Trace(__name__)

# The connection itself, and whether all is to end, is looked at at least so often while there is
# always something to send or to read: well below any heartbeat, and far above the time of a read.
_QUIET_S = 0.25
# Beyond what a loaded machine may oversleep: then we were stopped (Ctrl-Z).
_STOPPED_S = 5.0
# An archiver that has not answered on a new connection by then is asked on another: a
# connection that is dead is noticed after 9 s (connection.py). What is said on a living
# one is not lost: of 207 resumed connections each was answered at the first asking,
# within 4 ms. What needs this is a handshake that was garbled so that both sides
# wait for more; the archiver gives that up after as long (listening.py).
_ASK_AGAIN_S = 10.0
# A connection that cannot be made is tried again, ever more seldom: a cable that
# is back is to be noticed, an archiver that is gone not to be hammered.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0


class UnackedFrames:
    """The frames in flight, oldest first. Pure.

    Their messages are kept where a lost connection may have lost them. Credit bounds them;
    their data stays where it is.
    """

    def __init__(self) -> None:
        self._frames: deque[tuple[int, list[Part], Callable[[], None] | None]] = deque()

    def add(self, seq: int, parts: list[Part], on_ack: Callable[[], None] | None = None) -> None:
        self._frames.append((seq, parts, on_ack))

    def acknowledge(self, acked: int) -> None:
        """Frames up to `acked` are written: call what was to be called then."""
        while self._frames and self._frames[0][0] <= acked:
            _, _, on_ack = self._frames.popleft()
            if on_ack is not None:
                on_ack()

    def behind(self, received: int) -> Iterator[list[Part]]:
        """Yield the messages of frames that have not arrived."""
        for seq, parts, _ in self._frames:
            if seq > received:
                yield parts


class RefusedByArchiver(Failure):
    """The archiver refused the device, or the job failed elsewhere."""


class Session:
    """A producer's session, from HELLO to DONE; the data of its runs lies in `ring`.

    Without a ring it comes along (`send_data`); several such sessions of one thread keep each other alive by
    `poll`, with `say_hello` and `say_end` in place of the calls that wait.
    """

    def __init__(
        self,
        name: str,
        size_bytes: int,
        connection: ArchiverConnection,
        job: bytes,
        ring: Ring | None,
        cancel: Cancel,
    ) -> None:
        self._name = name
        self._connection = connection
        self._cancel = cancel
        self._ring = ring
        # Over a network it cannot be opened, and its name need not be known.
        shared_at = ring.shared_at if ring is not None and connection.is_local else ""
        # On one host a connection ends only with a process, and there is no peer to go on with.
        session = b"" if connection.is_local else os.urandom(limits.UUID_BYTES)
        self._side = ProducerSide(job, name, size_bytes, "vmapipe", shared_at, session)
        self._in_flight = UnackedFrames()
        self._clusters = cluster_count(size_bytes)
        self._since_base: SinceBase | None = None
        #: True: `since_base` cuts runs, because the archiver has digests of the base.
        self.compares = False
        #: Takes what `want` has asked for: the first cluster, and digests.
        self.on_digests: Callable[[int, bytes], None] | None = None
        #: The new connection has not been answered yet; since when it exists.
        self._away = False
        self._asked_at = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._heard = self._pinged = self.spoke = self._looked = time.monotonic()
        self.zero_clusters = self.unchanged_clusters = 0
        #: Payload bytes; zero runs carry none.
        self.sent_bytes = 0

    @property
    def credit(self) -> int:
        return 0 if self._away else self._side.credit

    @property
    def frame_bytes(self) -> int:
        """The largest charge of one frame."""
        return self._side.frame_bytes

    @property
    def sent_clusters(self) -> int:
        return self._side.sent_clusters

    def greet(self) -> None:
        """Return when the archiver has accepted this device and all others of the job. Raises Failure."""
        self.say_hello()
        self.wait_until(self.is_accepted)
        if self._side.digest_key:
            self._since_base = SinceBase(self._side.digest_key, self._clusters)
            self.compares = True

    def say_hello(self) -> None:
        self._send(self._side.hello())

    def is_accepted(self) -> bool:
        """Return whether the archiver has accepted this device, and all others of the job."""
        accepted = self._side.state is ProducerState.SENDING
        if accepted:
            self._connection.is_settled = True
        return accepted

    def send(self, run: Run, on_ack: Callable[[], None] | None = None) -> None:
        """Send a run, for which the credit must suffice.

        `on_ack` is called when its memory is free: it is acknowledged, or has no data.
        """
        if run.length and self._side.shared:
            parts = self._side.shared_run(run.first_cluster, run.clusters, run.masks, run.position)
        else:
            memory = self._ring.view if self._ring is not None else b""
            payload = memory[run.position : run.position + run.length]
            parts = self._side.run(run.first_cluster, run.clusters, run.masks, payload)
        self._send_frame(run, parts, on_ack)

    def send_data(self, run: Run, data: Part) -> None:
        """Send a run whose data is `data`, which does not change any more; its `position` counts for nothing."""
        parts = self._side.run(run.first_cluster, run.clusters, run.masks, data)
        self._send_frame(run, parts, None)

    def _send_frame(self, run: Run, parts: list[Part], on_ack: Callable[[], None] | None) -> None:
        self._send(parts)
        if not run.length and on_ack is not None:
            on_ack()
            on_ack = None
        if on_ack is not None or self._side.reconnect_s:
            kept = parts if self._side.reconnect_s else []
            self._in_flight.add(self._side.sent_frames, kept, on_ack)
        self.sent_bytes += run.length
        self.zero_clusters += run.zero_clusters

    @property
    def has_base(self) -> bool:
        """True when the archiver takes `send_unchanged`: it has an earlier archive of the device."""
        return self._side.has_base

    def since_base(self, run: Run, memory: memoryview) -> list[Run | UnchangedClusters] | None:
        """Cut a run into what has changed since the base and what has not, by digests.

        The run as it is where there are none. None: they are under way; try again when
        something has come.
        """
        if self._since_base is None:
            return [run]
        for first, clusters in self._since_base.wants(run.first_cluster) if not self._away else ():
            self._send(self._side.want(first, clusters))
        return self._since_base.split(run, memory)

    @property
    def digest_key(self) -> bytes:
        """The key of the digests that the archiver has of the base's clusters; empty: it has none."""
        return self._side.digest_key

    def want(self, first: int, clusters: int) -> None:
        """Ask for digests, for `on_digests`; on a host of its own no connection is lost."""
        self._send(self._side.want(first, clusters))

    def send_unchanged(self, first_cluster: int, clusters: int) -> None:
        """Say that clusters are as in the base; any number, for a credit of CHARGE_PER_FRAME."""
        parts = self._side.unchanged(first_cluster, clusters)
        self._send(parts)
        if self._side.reconnect_s:
            self._in_flight.add(self._side.sent_frames, parts)
        self.unchanged_clusters += clusters

    def send_from_ring(self, run: Run) -> None:
        """Send a run whose data lies in a piece of the ring, which is held until it is free."""
        if run.length and self._ring is not None:
            self._ring.hold(run.position, run.length)
            self.send(run, functools.partial(self._ring.free, run.position))
        else:
            self.send(run)

    @property
    def scatters(self) -> bool:
        """True when the archiver takes `send_scattered`."""
        return self._side.scatters

    def send_scattered(self, clusters: Sequence[SharedCluster], on_ack: Callable[[], None]) -> None:
        """Send clusters of the ring's memory, as `send`. Memory is shared: no connection is lost."""
        self._send(self._side.scattered(clusters))
        self._in_flight.add(self._side.sent_frames, [], on_ack)
        self.sent_bytes += scattered_bytes(clusters)
        self.zero_clusters += sum(not cluster.mask for cluster in clusters)

    def end(self) -> None:
        """Say that all is sent; return when the archive is stored. Raises Failure."""
        self.say_end()
        self.wait_until(self.is_over)
        self.say_bye()

    def say_end(self) -> None:
        self._send(self._side.end())

    def is_over(self) -> bool:
        return self._side.state is ProducerState.CLOSED

    def say_bye(self) -> None:
        if self._side.reconnect_s:
            self._send(self._side.bye())

    def fail(self, reason: str) -> None:
        self._away = False  # it is worth a try
        self._send(self._side.fail(reason))

    def _send(self, parts: list[Part]) -> None:
        if _log.has(DEBUG):
            level = TRACE if len(parts) > 1 else DEBUG
            _log.log(level, "%s sends %s", self._name, shown(parts))
        # While there is no answer, what is kept is sent again later, and the rest is worth nothing.
        if not self._away:
            self._connection.send(parts)
        self.spoke = time.monotonic()

    def receive(self) -> None:
        """Take in what has come. Raises RefusedByArchiver."""
        while (parts := self._connection.receive()) is not None:
            self._heard = time.monotonic()
            message = self._side.receive(parts)
            if _log.has(DEBUG):
                level = TRACE if isinstance(message, Grant) else DEBUG
                _log.log(level, "%s receives %s", self._name, shown(message))
            match message:
                case Refuse(code, reason):
                    raise RefusedByArchiver(
                        f"the archiver refused {self._name!r}: {reason} [{code}]"
                    )
                case Abort(reason):
                    raise RefusedByArchiver(f"the job was ended: {reason}")
                case Resumed(received, _, _, ended):
                    self._go_on(received, ended=ended)
                    self._in_flight.acknowledge(self._side.acked)
                case Have(first, digests) if self.on_digests is not None:
                    self.on_digests(first, digests)
                case Have(first, digests) if self._since_base is not None:
                    self._since_base.take(first, digests)
                case Grant() | Done():
                    self._in_flight.acknowledge(self._side.acked)

    def poll(self) -> None:
        """Take in what has come, without waiting; now and then as `step`. Raises Failure."""
        if time.monotonic() - self._looked > _QUIET_S:
            self.step(0)
        else:
            self.receive()

    def watch(self, fd: int) -> None:
        """End each wait also when `fd` becomes readable."""
        self._connection.watch(fd)

    def unwatch(self, fd: int) -> None:
        self._connection.unwatch(fd)

    def wait_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self.step(self._side.ping_s)

    def step(self, longest_s: float) -> None:
        """Wait for anything for at most `longest_s`; keep the session alive meanwhile."""
        before = time.monotonic()
        longest_s = min(longest_s, self._side.ping_s)
        if self._connection.lost:
            longest_s = min(longest_s, max(0.0, self._asked_at + self._pause_s - before))
        self._connection.wait(longest_s)
        self._cancel.check()
        self.receive()
        now = self._looked = time.monotonic()
        if now - before > longest_s + _STOPPED_S:
            # This process itself was stopped: a peer's silence does not count.
            self._heard = now
        self.keep_alive(now)

    def keep_alive(self, now: float) -> None:
        """Ask for a sign of life in time. Raises Failure when the archiver is silent for too long."""
        silence_s, reconnect_s = now - self._heard, self._side.reconnect_s
        if silence_s > max(self._side.heartbeat_s, reconnect_s):
            raise Failure(self._silent_words())
        if self._side.state is ProducerState.CLOSED:
            return
        asked_s = now - self._asked_at
        if (self._connection.lost and asked_s >= self._pause_s) or (
            self._away and asked_s > _ASK_AGAIN_S
        ):
            self._reconnect(now)
        # An archiver has no need to answer data: a producer that only sends would hear nothing.
        silence_s = now - min(self.spoke, max(self._heard, self._pinged))
        if silence_s >= self._side.ping_s:
            self._pinged = now
            self._send(self._side.ping())

    def _silent_words(self) -> str:
        if self._side.reconnect_s:
            return connection_lost(self._name, max(self._side.heartbeat_s, self._side.reconnect_s))
        return (
            f"device {self._name!r}: the archiver has been silent for "
            f"{self._side.heartbeat_s:.0f} s; is it still running?"
        )

    def _reconnect(self, now: float) -> None:
        """Open a new connection and identify; nothing else is sent until the archiver answers."""
        greeting = self._side.state is ProducerState.GREETING
        if self._connection.is_local or not (greeting or self._side.reconnect_s):
            return
        self._connection.reconnect()
        self._asked_at = now
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if greeting:
            self._connection.send(self._side.hello())
        else:
            self._away = True
            self._connection.send(self._side.resume())

    def _go_on(self, received: int, *, ended: bool) -> None:
        self._away = False
        self._pause_s = _FIRST_PAUSE_S
        if self._since_base is not None:
            self._since_base.ask_again()
        for parts in self._in_flight.behind(received):
            self._send(parts)
        if self._side.state is ProducerState.ENDING and not ended:
            self._send(self._side.end_again())

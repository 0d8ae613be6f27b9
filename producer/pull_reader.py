# SPDX-License-Identifier: Apache-2.0
"""Reads an export in the order of the disk: several pieces are under way, and their runs come one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vmapipe.clusters.sizes import CLUSTER_BYTES
from vmapipe.producer.pull.connection import Answer, Task
from vmapipe.producer.pull.connections import Endpoint, ExportConnections
from vmapipe.producer.pull.export import ExportError
from vmapipe.producer.pull_plan import (
    Content,
    ExportExtent,
    PullPiece,
    PullPlan,
    extents_told,
)
from vmapipe.producer.runs import Run, piece_bytes, whole_blocks
from vmapipe.producer.shared_memory import Ring
from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_TRIM,
)
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.text import one_line

# Each answer costs Python some 50 us: with 256 KiB they were a sixth of all the time of a processor
# that a backup took. Larger ones than this gain nothing, and fill the server's caches.
_READ_BYTES = 1 << 20
# Beside the piece that each connection is busy with.
_PIECES_AHEAD = 1
# Bytes that an export has to have again at the end, and when it comes back.
_FINGERPRINT_BYTES = 4096
_MAX_WORDS_CHARS = 500


class PulledRun(NamedTuple):
    """A run of the disk, and what frees its memory; `is_unchanged`: it is as the base has it."""

    run: Run
    free: Callable[[], None] | None = None
    is_unchanged: bool = False


class PullReader:
    """The disk of an export, which does not change while it is read. Every method may raise ExportError."""

    def __init__(
        self, endpoint: Endpoint, cancel: Cancel, *, trims: bool = False, compares: bool = True
    ) -> None:
        """Return when the export is open.

        `trims`: free on the server what has been read. `compares`: an export that has other bytes
        than before is refused.
        """
        self.name = endpoint.name
        self.shown = endpoint.shown
        self._trims = trims
        self._compares = compares
        #: The dirty bitmap that is asked for; empty: none.
        self.bitmap = endpoint.bitmap
        self._bitmap_context = endpoint.bitmap_context
        self._is_incremental = False
        self._connections = ExportConnections(endpoint, cancel)
        try:
            self._check_export()
        except BaseException:
            self._connections.close()
            raise
        self.size_bytes = self._connections.export.size_bytes
        #: What `begin` needs of memory behind the ring.
        self.beside_bytes = 0
        self._plan: PullPlan | None = None
        self._ring: Ring | None = None
        # In order; the first ones may be complete.
        self._pieces: deque[PullPiece] = deque()
        self._proof: Task | None = None
        self._is_proven = False
        #: Whether more is known than when `plan_ahead` was called last.
        self.knows_more = False
        #: Not counting holes.
        self.read_bytes = 0
        #: What is said once, and the backup goes on.
        self.notices: list[str] = []

    def _check_export(self) -> None:
        export = self._connections.export
        odd = export.size_bytes % export.block_sizes.minimum
        if odd:
            raise self._error(
                f"the export's last {odd} bytes cannot be read: it has {export.size_bytes} bytes, and "
                f"its server reads whole blocks of {export.block_sizes.minimum} only"
            )
        can_trim = export.flags & NBD_FLAG_SEND_TRIM and not export.flags & NBD_FLAG_READ_ONLY
        if self._trims and not can_trim:
            raise self._error(
                "the export takes no TRIM (it is read-only, or cannot): leave out --trim, or make "
                "it writable if it is a scratch file that nobody needs afterwards"
            )

    @property
    def fd(self) -> int:
        """Readable when there is something to do."""
        return self._connections.fd

    @property
    def why_full(self) -> str:
        """Why the bitmap cannot tell what has to be read, in words; empty: it can."""
        if self._connections.session.context_id(self._bitmap_context) is None:
            return (
                f"the export does not offer the bitmap {self.bitmap!r} (the metadata context "
                f"{self._bitmap_context})"
            )
        return ""

    def begin(self, ring: Ring, frame_bytes: int, *, is_incremental: bool = False) -> None:
        """Read into `ring`; frames charge at most `frame_bytes`.

        `is_incremental`: leave out what the bitmap does not call dirty, for which `why_full` has to
        be empty.
        """
        self._ring = ring
        self._is_incremental = is_incremental
        self._plan = PullPlan(self.size_bytes, frame_bytes)
        if not is_incremental and self._connections.session.allocation_id is None:
            # All may be data.
            self._plan.layout.question()
            self._plan.layout.tell([ExportExtent(0, self.size_bytes, Content.DATA)])

    # --- what is to be read ---

    def plan_ahead(self, frame_bytes: int) -> int | None:
        """Ask for the next piece; return its bytes of data, or None when nothing more can be asked now."""
        plan, ring = self._begun()
        self.knows_more = False
        self._ask_where_data_is(plan)
        if len(self._pieces) >= self._connections.count + _PIECES_AHEAD:
            return None
        most = piece_bytes(frame_bytes)
        ring.fit(most)
        if ring.take(most) is None:
            return None
        piece = plan.next_piece(frame_bytes)
        if piece is None:
            # It has used up what was known.
            self._ask_where_data_is(plan)
            return None
        self._pieces.append(piece)
        if piece.data_bytes:
            self._ask(piece, ring)
        return piece.data_bytes

    def _ask_where_data_is(self, plan: PullPlan) -> None:
        if question := plan.layout.question():
            self._connections.submit(Task(NBD_CMD_BLOCK_STATUS, *question))

    def _ask(self, piece: PullPiece, ring: Ring) -> None:
        length = whole_blocks(piece.data_bytes)
        position = ring.take(length)
        if position is None:
            raise RuntimeError("room in the ring has vanished")
        ring.hold(position, length)
        piece.position = position
        longest = self._connections.longest_read(_READ_BYTES)
        for request in piece.requests(longest):
            into = ring.view[request.position : request.position + request.length]
            task = Task(
                *(NBD_CMD_READ, request.offset, request.length, into, piece, request.position)
            )
            self._connections.submit(task)

    # --- what has come ---

    def pump(self, wait_s: float) -> bool:
        """Wait for at most `wait_s` and take in what comes; whether anything did."""
        answers = self._connections.pump(wait_s)
        for answer in answers or ():
            self._take(answer)
        return answers is not None

    def _take(self, answer: Answer) -> None:
        task = answer.task
        if task.kind == NBD_CMD_TRIM:
            if answer.error and self._trims:
                # It costs the server's room, and nothing else.
                self._trims = False
                words = one_line(answer.words, _MAX_WORDS_CHARS)
                self.notices.append(
                    f"disk {self.name!r}: cannot trim at offset {answer.offset}: {words}; what is "
                    "read is not freed any more"
                )
            return
        if answer.error and self._can_ask_bitmap_alone(task):
            self._connections.ask_bitmap_alone()
            self._connections.submit(task)
            return
        if answer.error:
            words = one_line(answer.words, _MAX_WORDS_CHARS)
            end = " at the end, when all was read" if task is self._proof else ""
            raise self._error(f"cannot read near offset {answer.offset}{end}: {words}")
        if task.kind == NBD_CMD_BLOCK_STATUS:
            self._tell(task, answer)
        elif task is self._proof:
            self._check_proof(task)
        elif isinstance(task.about, PullPiece):
            self._came(task, task.about)

    def _can_ask_bitmap_alone(self, task: Task) -> bool:
        """Whether it may be base:allocation that failed: some servers answer nothing outside of what is dirty."""
        both = self._is_incremental and BASE_ALLOCATION in self._connections.contexts
        return both and task.kind == NBD_CMD_BLOCK_STATUS and task is not self._proof

    def _tell(self, task: Task, answer: Answer) -> None:
        if task is self._proof:
            self._is_proven = True
            return
        plan, _ = self._begun()
        allocation = answer.statuses.get(BASE_ALLOCATION)
        dirty = answer.statuses.get(self._bitmap_context) if self._is_incremental else None
        if self._is_incremental and dirty is None:
            raise RuntimeError("a block status without the bitmap")
        self.knows_more = True
        plan.layout.tell(
            extents_told(
                task.offset,
                allocation.extents() if allocation else None,
                dirty.extents() if dirty else None,
            )
        )

    def _came(self, task: Task, piece: PullPiece) -> None:
        self.read_bytes += task.length
        is_first = self._connections.fingerprint is None and self._compares
        if is_first and task.into is not None:
            self._connections.fingerprint = task.offset, bytes(task.into[: self._proof_bytes])
        piece.came(task.length)
        if piece.is_complete and self._trims:
            self._trim(piece)

    def _trim(self, piece: PullPiece) -> None:
        """Free what was read, but for what is read again at the end."""
        kept = self._connections.fingerprint[0] if self._connections.fingerprint else 0
        kept -= kept % CLUSTER_BYTES
        for offset, length, _ in piece.requests(CLUSTER_BYTES):
            if offset - offset % CLUSTER_BYTES != kept:
                self._connections.submit(Task(NBD_CMD_TRIM, offset, length))

    @property
    def has_run(self) -> bool:
        """Whether `next_run` has one."""
        return bool(self._pieces) and self._pieces[0].is_complete

    def next_run(self) -> PulledRun | None:
        """Return the next run of the disk; None: it is not there yet."""
        _, ring = self._begun()
        if not self.has_run:
            return None
        piece = self._pieces.popleft()
        run = piece.run(ring.view)
        if not piece.data_bytes:
            return PulledRun(run, is_unchanged=piece.is_unchanged)
        position = piece.position
        if not run.length:
            ring.free(position)
            return PulledRun(run)
        return PulledRun(run, lambda: ring.free(position))

    # --- the end ---

    @property
    def has_all(self) -> bool:
        """Whether `next_run` has returned all of the disk."""
        return self._plan is not None and self._plan.ended and not self._pieces

    def prove(self) -> bool:
        """Ask for the last read, which tells that the export still is what it was; whether it did."""
        if self._proof is None and not self._connections.outstanding:
            self._proof = self._last_question()
            self._connections.submit(self._proof)
        return self._is_proven

    def _last_question(self) -> Task:
        known = self._connections.fingerprint
        if known is None and self._is_incremental:
            # Nothing was read, and it may be that nothing can be.
            return Task(NBD_CMD_BLOCK_STATUS, 0, min(self._proof_bytes, self.size_bytes))
        offset, wanted = known or (0, b"")
        length = len(wanted) or min(self._proof_bytes, self.size_bytes)
        return Task(NBD_CMD_READ, offset, length, memoryview(bytearray(length)))

    @property
    def _proof_bytes(self) -> int:
        return max(_FINGERPRINT_BYTES, self._connections.export.block_sizes.minimum)

    def _check_proof(self, proof: Task) -> None:
        known = self._connections.fingerprint
        if known is not None and proof.into is not None and bytes(proof.into) != known[1]:
            raise self._error(
                f"the export was written to while it was read (offset {proof.offset}): back up a "
                "frozen one, such as a snapshot"
            )
        self._is_proven = True

    def close(self) -> None:
        self._connections.close()

    def _begun(self) -> tuple[PullPlan, Ring]:
        if self._plan is None or self._ring is None:
            raise RuntimeError("not begun")
        return self._plan, self._ring

    def _error(self, text: str) -> ExportError:
        return ExportError(f"disk {self.name!r}: {text}")

# SPDX-License-Identifier: Apache-2.0
"""An object of an S3 store: parts go up while the archive is made; it appears when it is complete.

Requests are made by threads of their own, so that neither a stop nor an
`abandon` waits for a store that does not answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vmapipe.archiver.outputs.base import (
    ABANDON_WAIT_S,
    AbortableOutput,
    Buffers,
    OutputFailure,
)
from vmapipe.archiver.outputs.file import exists_failure
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.objectlock import ObjectLock
from vmapipe.runtime.objectstore import ConflictError, StoredObject, StoreError
from vmapipe.runtime.text import human_bytes
from vmapipe.runtime.threads import DaemonPool
from vmapipe.runtime.uuids import random_uuid

if TYPE_CHECKING:
    from concurrent.futures import Future

# An upload has 10,000 parts of at least 5 MiB, and its length is not known in advance. The parts
# double after two thousand and after every further one: an archive of 31 GiB goes in parts of
# 16 MiB, and the last step, of 512 MiB, ends at 2.4 TiB.
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
_PARTS_A_STEP = 1000
_MAX_DOUBLINGS = 5
# Parts on their way at the same time have this together, or are one: enough to fill a line of
# 1 Gbit/s at an answer time of half a second.
_AHEAD_BYTES = 64 << 20
_MAX_AHEAD = 4
# What a store says that knows no If-None-Match.
_NO_CONDITIONS = ("NotImplemented", "501")
Result = TypeVar("Result")


def part_bytes(number: int, first_bytes: int) -> int:
    """The length of part `number`, the first being 1."""
    doublings = max(0, (number - 1) // _PARTS_A_STEP - 1)
    return first_bytes << min(doublings, _MAX_DOUBLINGS)


class ObjectOutput(AbortableOutput):
    """See `Output`. `replace`: an object that exists now may be replaced, and no other.

    `upload` is the id of the upload under way, told as an event as soon as there
    is one, for whoever has to clean up after this process was killed.
    """

    is_stream = False

    def __init__(
        self,
        name: str,
        *,
        cancel: Cancel | None = None,
        emit: Emit = ignore,
        replace: bool = False,
        first_part_bytes: int = PART_BYTES,
        lock: ObjectLock | None = None,
        resume: str = "",
    ) -> None:
        """`resume`: a word for these very bytes; parts of them that an earlier upload has brought are not sent again."""
        # First: it may refuse, and what comes next holds a descriptor.
        self._store = StoredObject(name, lock=lock)
        self._is_to_lock = lock is not None
        super().__init__(name, cancel)
        self.upload = ""
        self._emit = emit
        self._first_part_bytes = first_part_bytes
        self._mark = resume or random_uuid().hex()
        self._resume = bool(resume)
        # What an earlier upload has brought, by part: length and MD5.
        self._there: dict[int, tuple[int, str]] = {}
        self._left = ""
        #: Bytes that were there and were not sent again.
        self.kept_bytes = 0
        self._condition = {"IfNoneMatch": "*"}
        self._total_bytes = 0
        self._part = bytearray()
        self._etags: list[str] = []
        self._sending: deque[tuple[Future[str], int]] = deque()
        self._began: Future[None] | None = None
        self._number = 0
        self._pool = DaemonPool(_MAX_AHEAD + 1, "s3")
        try:
            found = self._wait(self._pool.submit(self._store.head))
            if found is not None and not replace:
                raise exists_failure(name)
            if lock is not None:
                self._wait(self._pool.submit(self._store.check_lock))
            if self._resume:
                self._wait(self._pool.submit(self._find_parts))
            if found is not None:
                self._condition = {"IfMatch": found.etag}
            elif not replace:
                self._wait(
                    self._pool.submit(lambda: abort_stale_uploads(self._store, self._notice))
                )
        except BaseException as error:
            self.abandon()
            if isinstance(error, StoreError):
                raise self._failure(error) from error
            raise

    def write(self, buffers: Buffers) -> None:
        self._exclusively(self._add_all, buffers)

    def check_free(self) -> None:
        """Check that the object was not made by another process meanwhile. Raises OutputFailure."""
        if self._wait(self._pool.submit(self._store.head)) is not None:
            raise exists_failure(self.description)

    def prepare(self) -> None:
        """All that a commit needs but the last request. Raises OutputFailure."""
        self._exclusively(self._prepare)

    def commit(self) -> None:
        self._exclusively(self._commit)

    def remove(self) -> None:
        """Take a committed object back, if it is still the one that was committed. Never raises."""
        run_with_timeout(self._remove_ours)

    # --- the thread that writes ---

    _errors = StoreError

    def _prepare(self) -> None:
        self._send_rest()
        self.check_free()

    def _commit(self) -> None:
        self._send_rest()
        if "IfNoneMatch" in self._condition:
            # A store that does not know conditions passes over them.
            self.check_free()
        self._began = self._pool.submit(self._publish)
        self._wait(self._began)
        self.written_bytes = self._total_bytes
        self._interrupt.check()
        self._end()
        self._store.close()

    def _failure(self, error: StoreError) -> OutputFailure:
        if isinstance(error, ConflictError):
            return exists_failure(self.description)
        sent = self.written_bytes
        text = f"{error}, after {human_bytes(sent)}" if sent else str(error)
        return OutputFailure(text, target=self.description, written_bytes=sent)

    def _add_all(self, buffers: Buffers) -> None:
        for buffer in buffers:
            self._add(memoryview(buffer))

    def _add(self, data: memoryview) -> None:
        while data:
            room = part_bytes(self._number + 1, self._first_part_bytes) - len(self._part)
            if not room:
                self._send_part()
                continue
            self._part += data[:room]
            self._total_bytes += len(data[:room])
            data = data[room:]
        self._interrupt.check()

    def _send_part(self) -> None:
        if self._number == MAX_PARTS:
            raise OutputFailure(
                f"{self.description} is larger than an upload of {MAX_PARTS} parts can be: "
                f"{human_bytes(self._total_bytes)}; compress it, or make one archive a disk",
                target=self.description,
            )
        if not self._number:
            self._take_upload(self._part)
        if not self.upload:
            self.upload = self._wait(self._pool.submit(lambda: self._store.begin(self._mark)))
            self._emit({"event": "upload", "archive": self.description, "upload": self.upload})
        data, self._part = self._part, bytearray()
        self._number += 1
        upload, number = self.upload, self._number
        length, etag = self._there.get(number, (-1, ""))
        if length == len(data) and etag == _md5(data):
            self.kept_bytes += length
            self._sending.append((self._pool.submit(lambda: etag), length))
            return
        most = max(1, min(_MAX_AHEAD, _AHEAD_BYTES // len(data) if data else 1))
        while len(self._sending) >= most:
            self._take_oldest()
        future = self._pool.submit(lambda: self._store.put_part(upload, number, data))
        self._sending.append((future, len(data)))

    def _send_rest(self) -> None:
        # An archive that is not as long as a part goes in one request, at the commit.
        if self._number and self._part:
            self._send_part()
        while self._sending:
            self._take_oldest()

    def _take_oldest(self) -> None:
        future, length = self._sending[0]
        self._etags.append(self._wait(future))
        self._sending.popleft()
        self.written_bytes += length

    def _wait(self, future: Future[Result]) -> Result:
        """Its result; raises Cancelled or OutputFailure when the work is to end first."""
        ended = os.eventfd(0, os.EFD_CLOEXEC)
        # Ours is closed before the future may end: each has its own.
        theirs = os.dup(ended)

        def tell(_: Future[Result]) -> None:
            os.eventfd_write(theirs, 1)
            os.close(theirs)

        try:
            future.add_done_callback(tell)
            if not future.done():
                self._interrupt.wait(None, ended)
            self._interrupt.check()
            return future.result()
        finally:
            os.close(ended)

    # --- threads of the pool ---

    def _publish(self) -> None:
        try:
            self._make(self._condition)
        except StoreError as error:
            # An answer that was lost: what was then tried again met our own object.
            with contextlib.suppress(StoreError):
                if self._is_there():
                    return
            if error.code not in _NO_CONDITIONS:
                raise
            # What was there was seen just now; there is no better way in such a store.
            self._make({})
        if not self._is_there():
            raise StoreError(
                f"{self.description} is not what was written: its size or its mark is another one"
            )
        if self._is_to_lock:
            self._check_locked()

    def _check_locked(self) -> None:
        """A store that passes over what it does not know takes the object all the same: it goes again then."""
        locked = self._store.is_locked()
        if locked is None:
            self._notice(
                f"{self.description} was stored with --lock, and whether it is locked cannot be seen: these "
                "credentials lack s3:GetObjectRetention, or the store does not tell"
            )
        elif not locked:
            raise StoreError(
                f"the store took {self.description}, and did not lock it for as long as was asked: choose another "
                "store, or leave --lock out"
            )

    def _make(self, condition: Mapping[str, str]) -> None:
        if self.upload:
            self._store.complete(self.upload, self._etags, condition)
        else:
            self._store.put(self._part, self._mark, condition)

    def _is_there(self) -> bool:
        found = self._store.head()
        return found is not None and (found.mark, found.size_bytes) == (
            self._mark,
            self._total_bytes,
        )

    def _notice(self, text: str) -> None:
        self._emit({"event": "notice", "text": text})

    def _find_parts(self) -> None:
        """The newest upload of this object that was given up, and its parts."""
        for key, upload, _ in self._store.uploads_beside((self._store.key.rpartition("/")[2],)):
            if key == self._store.key:
                self._left, self._there = upload, dict(self._store.parts(upload))

    def _take_upload(self, first_part: bytearray) -> None:
        """Go on with the upload that was left, if its first part is ours: else it is somebody else's."""
        if self._there.get(1) == (len(first_part), _md5(first_part)):
            self.upload = self._left
        else:
            self._there = {}

    def spoil(self) -> None:
        """Let nobody go on with it."""
        self._resume = False

    # --- giving up ---

    def _rollback(self) -> None:
        sending: list[Future[Any]] = [future for future, _ in self._sending]
        if self._began is not None:
            sending.append(self._began)
        self._end()
        # Before parts that still go up have ended, and once more after that: a
        # part that arrives after its upload was aborted may stay with the store.
        run_with_timeout(lambda: self._clean_up(sending))

    def _clean_up(self, sending: Sequence[Future[Any]]) -> None:
        under_way = [future for future in sending if not future.done()]
        if self.upload and not self._resume:
            abort(self._store, self.upload)
            if under_way:
                from concurrent.futures import wait

                wait(under_way)
                abort(self._store, self.upload)
        if self._began is not None:
            self._remove_ours()
        self._store.close()

    def _remove_ours(self) -> None:
        with contextlib.suppress(StoreError):
            found = self._store.head()
            if found is not None and found.mark == self._mark:
                self._store.remove()
        self._store.close()

    def _end(self) -> None:
        self._over = True
        self._sending.clear()
        self._part = bytearray()
        self._pool.close()
        self._interrupt.close()


def _md5(data: bytes | bytearray) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# No backup pauses for a day: an upload of an archive to which no part was added for so
# long was left behind by a process that was killed.
STALE_S = 24 * 3600.0
_ENDINGS = (
    *(".vma", ".vma.zst", ".vma.age", ".vma.zst.age"),
    *(".manifest.json", ".manifest.json.sig", ".digests"),
)


def abort(store: StoredObject, upload: str) -> None:
    """Never raises: what cannot be aborted now is the next backup's, or the bucket's lifecycle's."""
    with contextlib.suppress(StoreError):
        store.abort(upload)


def abort_stale_uploads(
    store: StoredObject, tell: Callable[[str], None], *, below: bool = False
) -> None:
    """In the folder of this object, what processes that were killed have left. Never raises.

    `below`: in the folders below that, too.
    """
    with contextlib.suppress(StoreError):
        for key, upload, idle_s in store.uploads_beside(_ENDINGS, below=below):
            if idle_s >= STALE_S:
                sibling = store.sibling(key)
                sibling.abort(upload)
                sibling.close()
                tell(f"an upload of {key} that was left behind was aborted")


def abort_upload(name: str, upload: str) -> None:
    """Abort an upload of an archiver that was killed. Never raises; takes seconds at most."""
    with contextlib.suppress(Failure), contextlib.closing(StoredObject(name)) as store:
        run_with_timeout(lambda: abort(store, upload))


def run_with_timeout(work: Callable[[], None]) -> None:
    """Run `work` in a thread, and wait for it no longer than an abandon may take."""
    thread = threading.Thread(target=work, name="s3-cleaner", daemon=True)
    thread.start()
    thread.join(ABANDON_WAIT_S)

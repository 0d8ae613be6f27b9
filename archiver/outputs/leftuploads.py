# SPDX-License-Identifier: Apache-2.0
"""Uploads to an object store that nobody completes any more, and the parts that they keep."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from vmapipe.archiver.outputs.ending import ABANDON_WAIT_S
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.objectstore import StoredObject, StoreError

# Nobody pauses a backup for a day: an upload of an archive to which no part was added for so
# long was left behind by a process that was killed.
LEFT_OVER_S = 24 * 3600.0
_ENDINGS = (".vma", ".vma.zst", ".manifest.json")


def abort(store: StoredObject, upload: str) -> None:
    """Never raises: what cannot be aborted now is the next backup's, or the bucket's lifecycle's."""
    with contextlib.suppress(StoreError):
        store.abort(upload)


def abort_left_over(
    store: StoredObject, tell: Callable[[str], None], *, below: bool = False
) -> None:
    """In the folder of this object, what processes that were killed have left. Never raises.

    `below`: in the folders below that, too.
    """
    with contextlib.suppress(StoreError):
        for key, upload, idle_s in store.uploads_beside(_ENDINGS, below=below):
            if idle_s >= LEFT_OVER_S:
                sibling = store.sibling(key)
                sibling.abort(upload)
                sibling.close()
                tell(f"an upload of {key} that was left behind was aborted")


def abort_upload(name: str, upload: str) -> None:
    """For whoever outlives an archiver that was killed. Never raises; quick."""
    with contextlib.suppress(Failure), contextlib.closing(StoredObject(name)) as store:
        in_a_while(lambda: abort(store, upload))


def in_a_while(work: Callable[[], None]) -> None:
    """Do it; when it takes longer than giving up may take, leave it to itself."""
    thread = threading.Thread(target=work, name="s3-cleaner", daemon=True)
    thread.start()
    thread.join(ABANDON_WAIT_S)

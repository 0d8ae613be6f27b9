# SPDX-License-Identifier: Apache-2.0
"""Where the archives of each client go when that is an object store, and what is left there.

The front passes on the messages of all jobs and waits for nobody, so it asks the
store nothing while it runs: whether a name is taken is looked at by the job's
own archiver, which never replaces anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from vmapipe.archiver.manifests import SUFFIX
from vmapipe.archiver.outputs.leftuploads import abort_left_over, abort_upload
from vmapipe.archiver.service.jobs import Place, Room
from vmapipe.archiver.service.memory import available_memory_bytes
from vmapipe.archiver.service.places import check_request
from vmapipe.archiver.service.rules import ClientRules, Rules
from vmapipe.protocol import jobs
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.objectstore import StoredObject, check_prefix

# Parts that wait and five on their way are 96 MiB (and more above 31 GiB), the library 40.
JOB_MEMORY_BYTES = 256 << 20
# The slashes, a folder, an archive's name, and what its manifest's has behind that.
_LONGEST_REST_BYTES = 2 * (1 + jobs.MAX_ARCHIVE_NAME_BYTES) + len(SUFFIX)
# A store does not say what is free.
_WITHOUT_LIMIT_BYTES = 1 << 62

Uploads = Sequence[tuple[str, str]]


class ObjectPlaces:
    """The facts that the core of the service asks for (admission.Facts)."""

    def __init__(self, prefix: str, rules: ClientRules) -> None:
        """`prefix`: s3://BUCKET or s3://BUCKET/PREFIX. Raises UsageError."""
        check_prefix(prefix, _LONGEST_REST_BYTES)
        self._prefix = prefix.removesuffix("/")
        self._rules = rules

    def place(self, client: str, request: jobs.Open) -> Place:
        """Raises RemoteProtocolError."""
        check_request(request)
        try:
            rules = self._rules.of(client)
            _refuse_quota(rules)
        except Failure as failure:
            raise RemoteProtocolError("failed", f"on the service's side: {failure}") from failure
        folder = f"{self._prefix}/{rules.folder}" if rules.folder else self._prefix
        return Place(
            f"{folder}/{request.name}",
            max_jobs=rules.max_jobs,
            shared=self._rules.has_others(client),
        )

    def room(self) -> Room:
        return Room(_WITHOUT_LIMIT_BYTES, available_memory_bytes())

    def used_bytes(self, client: str) -> int:
        """There are no quotas, so nobody asks."""
        return 0

    def check(self, left: Uploads, tell: Callable[[str], None]) -> None:
        """Before the first job: the store answers, and what was left there is aborted.

        `left`: uploads of services that were killed on this host. Others below
        the prefix are left over when nothing was added for a day. Raises Failure.
        """
        # Any name of ours will do.
        with contextlib.closing(StoredObject(f"{self._prefix}/vm.vma")) as store:
            store.look_at_bucket()
            for name, upload in left:
                abort_upload(name, upload)
                tell(f"an upload of {name} that a killed service left behind was aborted")
            abort_left_over(store, tell, below=True)


def _refuse_quota(rules: Rules) -> None:
    """Raises Failure."""
    if rules.quota_bytes:
        raise Failure("a quota is not counted in an object store: set a limit at the store")


def abort_uploads(uploads: Uploads) -> threading.Thread:
    """Of an archiver that was killed. In a thread: the store may be slow."""

    def work() -> None:
        for name, upload in uploads:
            abort_upload(name, upload)

    thread = threading.Thread(target=work, name="s3-cleaner", daemon=True)
    thread.start()
    return thread

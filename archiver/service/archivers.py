# SPDX-License-Identifier: Apache-2.0
"""The archivers of a service: a process for each job, its folder, its events, its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vmapipe.archiver.outputs.base import ABANDON_WAIT_S
from vmapipe.archiver.outputs.file import remove_leftover
from vmapipe.archiver.outputs.manifests import beside, files_of
from vmapipe.archiver.service.jobs import StartArchiver
from vmapipe.archiver.service.storage import abort_uploads
from vmapipe.runtime.children import STOP_S, Child
from vmapipe.runtime.events import Event
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.object_names import is_object

if TYPE_CHECKING:
    from vmapipe.runtime.child_event_types import UsageFields

# An archiver that has closed its end is looked at so often until it is gone.
REAP_S = 0.02


@dataclass(slots=True)
class _Member:
    child: Child
    folder: str
    path: str
    #: Its unfinished uploads to an object store: (the object's name, the upload's id).
    uploads: list[tuple[str, str]] = field(default_factory=list)
    #: When it closed its end of the socket; it must be gone soon afterwards.
    ending: float | None = None
    gone: bool = False


# For incomplete extents of a stable archive: a part of what a job is taken to need (admission.py).
_HOLD_BYTES = 32 << 20


class ArchiverProcesses:
    """`watch` and `unwatch`: what to do with a descriptor that tells of something."""

    def __init__(
        self,
        options: list[str],
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
        *,
        to_store: bool = False,
    ) -> None:
        self._options = options
        self._watch = watch
        self._unwatch = unwatch
        self._members: dict[bytes, _Member] = {}
        self._cleaners: list[threading.Thread] = []
        # A process that can open a job's socket can write its archive.
        self._folder = WorkFolder(takes_uploads=to_store)
        self._count = 0
        #: Uploads of services that were killed on this host.
        self.left_uploads = self._folder.left_uploads

    @property
    def in_a_hurry(self) -> bool:
        """True while the end of an archiver is awaited."""
        return any(m.ending is not None and not m.gone for m in self._members.values())

    def start(self, instruction: StartArchiver) -> None:
        """Raises OSError; nothing is then left."""
        self._count += 1
        folder = os.path.join(self._folder.path, str(self._count))
        os.mkdir(folder, 0o700)
        try:
            argv = self._argv(instruction, folder)
            child = Child(
                f"the archiver of {instruction.request.name!r}", "vmapipe.archiver.main", argv
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._members[instruction.job] = _Member(child, folder, instruction.path)
        self._watch(child.socket.fileno())

    def _argv(self, instruction: StartArchiver, folder: str) -> list[str]:
        request = instruction.request
        # With "=", because a name may begin with a dash.
        argv = [f"--listen={_endpoint(folder)}", f"--output={instruction.path}"]
        argv += [
            f"--job={instruction.job.hex()}",
            *(f"--device={name}" for name in request.devices),
        ]
        if request.uuid:
            argv.append(f"--uuid={request.uuid.hex()}")
        if request.time:
            argv.append(f"--time={request.time}")
        if request.stable:
            argv += ["--stable", f"--hold={_HOLD_BYTES}"]
        if request.compress:
            argv.append(f"--compress={request.compress}")
        if request.base:
            argv += ["--base=auto", f"--full-every={request.full_every}"]
            argv += [f"--recorded={uuid.hex()}" for uuid in request.recorded]
        if request.digests:
            argv.append("--digests")
        # What a service signs is the manifest, whatever its client says.
        signs = any(word.startswith("--sign=") for word in self._options)
        if not request.manifest and not signs:
            argv.append("--no-manifest")
        elif is_object(instruction.path):
            # Named, because it is not replaced then: its existence was not checked.
            argv.append(f"--manifest={beside(instruction.path)}")
        for index, (name, data) in enumerate(request.configs):
            path = os.path.join(folder, str(index))
            with open(path, "xb", opener=_private) as file:
                file.write(data)
            argv.append(f"--config={name}={path}")
        return [*argv, *self._options]

    def endpoint_of(self, job: bytes) -> str:
        return _endpoint(self._members[job].folder)

    def take_events(self) -> list[tuple[bytes, Event | None]]:
        """Return new events: (job, event), or (job, None) when its archiver is gone."""
        now = time.monotonic()
        taken: list[tuple[bytes, Event | None]] = []
        for job, member in list(self._members.items()):
            if member.ending is None:
                try:
                    events, ending = member.child.read_events()
                except ValueError:  # no event line; it was no archiver of ours that wrote it
                    events, ending = [], True
                    member.child.send_signal(signal.SIGKILL)
                for event in events:
                    self._handle_event(member, event)
                    taken.append((job, event))
                if ending:
                    self._unwatch(member.child.socket.fileno())
                    member.ending = now
            if member.ending is not None and not member.gone:
                member.gone = member.child.reap(0.0)
                if member.gone:
                    if (member.child.exit_code or 0) < 0:
                        self._remove_leftovers(member)
                    taken.append((job, None))
                elif now - member.ending > STOP_S:
                    member.child.send_signal(signal.SIGKILL)
        return taken

    def verdict(self, job: bytes) -> str:
        return self._members[job].child.verdict()

    def usage(self, job: bytes) -> UsageFields:
        child = self._members[job].child
        return {"cpu_s": round(child.cpu_s, 3), "peak_rss_bytes": child.peak_rss_bytes}

    def signal(self, job: bytes, signum: int) -> None:
        child = self._members[job].child
        if child.running:
            child.send_signal(signum)

    def release(self, job: bytes) -> None:
        member = self._members.pop(job, None)
        if member is not None:
            shutil.rmtree(member.folder, ignore_errors=True)

    def close(self) -> None:
        """End all that still run."""
        running = [m for m in self._members.values() if m.child.running]
        for member in running:
            member.child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for member in running:
            if not member.child.reap(max(0.0, deadline - time.monotonic())):
                member.child.send_signal(signal.SIGKILL)
                member.child.reap(STOP_S)
                self._remove_leftovers(member)
        for thread in self._cleaners:
            thread.join(ABANDON_WAIT_S)
        self._folder.remove()

    def _handle_event(self, member: _Member, event: Event) -> None:
        """Act at once on an event of an archiver."""
        match event["event"]:
            case "listening":
                self._remove_configs(member)
            case "upload":
                name, upload = event["archive"], event["upload"]
                member.uploads.append((name, upload))
                note_upload(member.folder, name, upload)

    def _remove_leftovers(self, member: _Member) -> None:
        """Remove what an archiver that was killed has left."""
        if is_object(member.path):
            self._cleaners = [thread for thread in self._cleaners if thread.is_alive()]
            self._cleaners.append(abort_uploads(member.uploads))
        else:
            for path in files_of(member.path):
                remove_leftover(path)

    @staticmethod
    def _remove_configs(member: _Member) -> None:
        """They are in the archiver's memory now; they may hold secrets."""
        for entry in os.listdir(member.folder):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(member.folder, entry))


def _endpoint(folder: str) -> str:
    return f"ipc://{folder}/archiver.sock"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# In a job's folder: a line for each of its uploads.
_UPLOADS = "uploads"
# As many as 16 KiB of notes tell; a job has two.
_MAX_NOTES_BYTES = 16 << 10


class WorkFolder(OwnFolder):
    """`takes_uploads`: this service goes to a store, and can abort what another one
    has left there; without, that stays for one that can. `left_uploads`: that, as
    (the object's name, the upload's id).
    """

    def __init__(self, *, takes_uploads: bool = False) -> None:
        self.left_uploads: list[tuple[str, str]] = []
        self._takes_uploads = takes_uploads
        # systemd's, which stays while the service is started again; its /tmp does not.
        parent = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        super().__init__("service", parent, self._keeps)

    def _keeps(self, path: str) -> bool:
        notes = Path(path).glob(f"*/{_UPLOADS}")
        left = [upload for file in notes for upload in read_uploads(file)]
        if left and not self._takes_uploads:
            return True
        self.left_uploads += left
        return False


def note_upload(folder: str, name: str, upload: str) -> None:
    """Record it for the next service, in case this one is killed with its archivers."""
    # A disk that is full costs the note, and no backup.
    with contextlib.suppress(OSError), open(os.path.join(folder, _UPLOADS), "ab") as notes:
        notes.write(json.dumps([name, upload]).encode() + b"\n")


def read_uploads(notes: Path) -> list[tuple[str, str]]:
    """(the object's name, the upload's id) each; what was not written whole is passed over."""
    uploads = []
    with notes.open("rb") as file:
        for line in file.read(_MAX_NOTES_BYTES).splitlines():
            with contextlib.suppress(ValueError):
                match json.loads(line):
                    case [str(name), str(upload)]:
                        uploads.append((name, upload))
    return uploads

# SPDX-License-Identifier: Apache-2.0
"""`lock: backup` in a machine's configuration, while we back it up: set and removed as `qm` does.

The file is written anew and renamed, under the flock that all of Proxmox VE's programs take. What the
lock looks like does not tell whose it is, so a note beside it does: the digest of the configuration
that we have written, and its time. The note itself is locked for as long as our process lives; whoever
finds it unlocked knows that a backup was killed, and removes the lock if the configuration is still the
one that was noted. Every other lock is somebody else's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from vmapipe.archiver.outputs.file import remove_leftover
from vmapipe.archiver.outputs.manifests import files_of
from vmapipe.control.hosts.pve.machine import MachineConfig
from vmapipe.control.hosts.pve.node import PveNode
from vmapipe.runtime.errors import Failure, os_error_text

LOCK = "backup"
# As long as Proxmox VE's own programs wait for each other.
_WAIT_S = 10.0
_AGAIN_S = 0.05
# Between our note and the file that it is about, when we are killed in between.
_SAME_MOMENT_S = 10.0
# The longest path (4096 bytes), each of its bytes escaped (six characters), and the rest.
_MAX_NOTE_BYTES = 32 << 10
# As Perl counts them: in a comment there may be ends of lines of Unicode's.
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_KEY = re.compile(r"([a-z][a-z0-9_-]*):")


def locked_text(text: str) -> str:
    """Return a configuration with our lock, at the place where Proxmox VE writes it. Pure."""
    lines = _LINE.findall(text)
    end = next((n for n, line in enumerate(lines) if line.startswith("[")), len(lines))
    while end and not lines[end - 1].strip():
        end -= 1
    if end and not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    after = (n for n in range(end) if (m := _KEY.match(lines[n])) and m[1] > "lock")
    lines.insert(next(after, end), f"lock: {LOCK}\n")
    return "".join(lines)


def unlocked_text(text: str) -> str:
    """Return a configuration without the lock of the machine as it is. Pure."""
    lines = _LINE.findall(text)
    for number, line in enumerate(lines):
        if line.startswith("["):
            break
        if line.startswith("lock:"):
            del lines[number]
            break
    return "".join(lines)


class BackupLock:
    """The lock of one machine. `take` and `release` it, or `remove` what a killed backup has left.

    Both remove the half archive of a backup that was killed, too: the next one has another name.
    All raise Failure.
    """

    def __init__(self, node: PveNode, vmid: int, archive: str = "") -> None:
        """`archive`: what is written under the lock. Raises Failure while another of our backups of this machine runs."""
        self._archive = archive
        self._node = node
        self._vmid = vmid
        self._path = node.config_path(vmid)
        self._note_path = node.note_path(vmid)
        self._note_fd = self._hold_note()
        self._written = ""
        #: The lock of a backup that was killed was there, and is ours now.
        self.was_left = False

    def take(self) -> MachineConfig:
        """Lock the machine; return its configuration as it was then, without the lock."""
        self._remove_half_archive()
        with self._changing():
            text = self._read()
            lock = MachineConfig(text).lock
            if lock:
                if lock != LOCK or not self._is_noted(text):
                    raise Failure(self._refusal(lock))
                text, self.was_left = unlocked_text(text), True
            self._written = locked_text(text)
            self._write(self._written)
        return MachineConfig(text)

    def release(self) -> str:
        """Unlock the machine; return a text for the user where the lock is not ours any more."""
        try:
            with self._changing():
                text = self._read()
                if not MachineConfig(text).lock:
                    return f"VM {self._vmid}: somebody has removed its lock during the backup"
                if text != self._written:
                    return (
                        f"VM {self._vmid}: its configuration was changed during the backup although it "
                        "was locked; the lock may be somebody else's now and stays: if no backup runs, "
                        f"`qm unlock {self._vmid}`"
                    )
                self._write(unlocked_text(text), is_locked=False)
            return ""
        finally:
            self.close()

    def remove(self) -> bool:
        """Remove the lock that a killed backup of ours has left; tell whether there was one."""
        self._remove_half_archive()
        try:
            with self._changing():
                text = self._read()
                is_ours = MachineConfig(text).lock == LOCK and self._is_noted(text)
                if is_ours:
                    self._write(unlocked_text(text), is_locked=False)
                elif not MachineConfig(text).lock:
                    self._remove_temporary()
                    self._write_note({})
            return is_ours
        except OSError as error:
            raise Failure(f"cannot change {self._note_path}: {os_error_text(error)}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Give the note up; it goes where no lock of ours is left."""
        if self._note_fd < 0:
            return
        with contextlib.suppress(OSError):
            if not os.fstat(self._note_fd).st_size:
                os.unlink(self._note_path)
        os.close(self._note_fd)
        self._note_fd = -1

    def _refusal(self, lock: str) -> str:
        text = f"VM {self._vmid} is locked ({lock})"
        if lock == LOCK:
            return (
                f"{text}: another backup of it runs, or was interrupted; the lock is not one that "
                f"vmapipe knows as its own. If none runs: `qm unlock {self._vmid}`"
            )
        return f"{text}: wait for the end of what holds it, or see `qm unlock {self._vmid}`"

    # --- The configuration ---

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Proxmox VE's own lock on changes of the configuration."""
        path = self._node.lock_path(self._vmid)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise Failure(f"cannot open {path}: {os_error_text(error)}") from error
        try:
            deadline = time.monotonic() + _WAIT_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise Failure(
                            f"{path}: another program has changed VM {self._vmid}'s configuration for "
                            f"{_WAIT_S:.0f} s: is it being migrated, or changed in the web interface?"
                        ) from error
                time.sleep(_AGAIN_S)
            yield
        finally:
            os.close(fd)

    def _read(self) -> str:
        return self._node.config(self._vmid).text

    def _write(self, text: str, *, is_locked: bool = True) -> None:
        """Write the configuration in one step, and the note before it; without a lock, empty after it."""
        temporary = f"{self._path}.tmp.{os.getpid()}"
        data = text.encode("utf-8", "surrogateescape")
        note = self._note_of(data, temporary)
        try:
            self._remove_temporary()
            self._write_note(note if is_locked else {**self._read_note(), "temporary": temporary})
            status = os.stat(self._path)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            try:
                with open(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    # pmxcfs has owners and modes of its own, and nothing to sync.
                    with contextlib.suppress(OSError):
                        os.fchmod(fd, status.st_mode & 0o777)
                        os.fchown(fd, status.st_uid, status.st_gid)
                        os.fsync(fd)
                os.rename(temporary, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            if is_locked:
                self._write_note({**note, "mtime_ns": os.stat(self._path).st_mtime_ns})
            else:
                self._write_note({})
        except OSError as error:
            raise Failure(
                f"cannot write {self._path}: {os_error_text(error)} (is this root, and has the cluster "
                "a quorum?)"
            ) from error

    def _remove_temporary(self) -> None:
        """Remove what a killed process of ours has not renamed; call it under Proxmox VE's lock."""
        left = self._read_note().get("temporary")
        if (
            isinstance(left, str)
            and left.startswith(f"{self._path}.tmp.")
            and "/" not in left[len(self._path) :]
        ):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)

    def _remove_half_archive(self) -> None:
        """Remove NAME.partial of a backup that was killed; one that is being written is locked, and stays."""
        archive = self._read_note().get("archive")
        if isinstance(archive, str) and os.path.isabs(archive):
            for path in files_of(archive):
                remove_leftover(path)

    # --- The note ---

    def _hold_note(self) -> int:
        """Open and lock the note. A lock of the process: no child has it, and it ends with us."""
        path = self._note_path
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            while True:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(path, flags, 0o600)
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Whoever had it before may have removed it since we opened it.
                    if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
        except BlockingIOError as error:
            raise Failure(f"another vmapipe backup of VM {self._vmid} is running") from error
        except OSError as error:
            raise Failure(f"cannot open {path}: {os_error_text(error)} (is this root?)") from error

    def _note_of(self, data: bytes, temporary: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        return {
            "sha256": digest,
            "time": time.time(),
            "temporary": temporary,
            "pid": os.getpid(),
            "archive": self._archive,
        }

    def _read_note(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._note_fd, _MAX_NOTE_BYTES, 0) or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write_note(self, note: dict[str, Any]) -> None:
        """Raises OSError. Empty: there is nothing to note."""
        data = json.dumps(note).encode() if note else b""
        os.pwrite(self._note_fd, data, 0)
        os.ftruncate(self._note_fd, len(data))
        os.fsync(self._note_fd)

    def _is_noted(self, text: str) -> bool:
        """Tell whether this is the configuration that a killed backup of ours has written."""
        note = self._read_note()
        data = text.encode("utf-8", "surrogateescape")
        if note.get("sha256") != hashlib.sha256(data).hexdigest():
            return False
        mtime_ns = os.stat(self._path).st_mtime_ns
        if "mtime_ns" in note:
            return bool(note["mtime_ns"] == mtime_ns)
        noted_s = note.get("time")
        return isinstance(noted_s, float) and abs(mtime_ns / 1e9 - noted_s) < _SAME_MOMENT_S

# SPDX-License-Identifier: Apache-2.0
"""Opens the output that an argument of the command line names."""

from __future__ import annotations

import os
import re
import stat
import time
from typing import TYPE_CHECKING

from vmapipe.archiver.outputs.base import Output, open_failure
from vmapipe.archiver.outputs.file import FileOutput, exists_failure
from vmapipe.archiver.outputs.stream import (
    check_kind,
    connect,
    open_device,
    open_fifo,
    open_inherited,
)
from vmapipe.runtime.arguments import check_storable
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.events import Emit, ignore
from vmapipe.runtime.object_names import is_object

if TYPE_CHECKING:
    from vmapipe.runtime.objectlock import ObjectLock

_STDOUT = 1
# Digits alone, so that int() cannot be surprised by "+1", "1_0" or a thousand of them.
_DESCRIPTOR = re.compile(r"(?:fd:|/dev/fdset/|/dev/fd/)([0-9]{1,9})")


def open_output(
    spec: str,
    *,
    cancel: Cancel | None = None,
    emit: Emit = ignore,
    lock: ObjectLock | None = None,
) -> Output:
    """Open what `spec` names; `emit` hears what there is to say of it. `lock`: of an object.

    `-`: standard output. `exec:COMMAND`: a command's standard input. `fd:N` or
    `/dev/fdset/N`: descriptor N, which the caller opened; it is ours then. So
    is `/dev/fd/N`, which is what a shell makes of `>(COMMAND)`.
    `s3://BUCKET/KEY`: an object of a store, which must not exist.
    Anything else is a path: of a FIFO (waits for its reader), a character
    device or a listening Unix socket, or else of a file that must not exist.
    Raises UsageError, OutputFailure, or Cancelled while waiting.
    """
    if spec == "-":
        return open_inherited(_STDOUT, "standard output", cancel, close=False)
    if spec.startswith("exec:"):
        from vmapipe.archiver.outputs.command import CommandOutput

        return CommandOutput(spec.removeprefix("exec:"), cancel=cancel)
    if match := _DESCRIPTOR.fullmatch(spec):
        number = int(match[1])
        return open_inherited(number, spec, cancel, close=number > 2)
    if is_object(spec):
        # Imported here, as what only locks need: other archives are begun sooner without.
        from vmapipe.archiver.outputs.object import ObjectOutput

        return ObjectOutput(spec, cancel=cancel, emit=emit, lock=lock)
    if spec.startswith("fd:"):
        raise UsageError(f"{spec!r}: after fd: comes the number of an open descriptor")
    check_storable(spec)
    if not spec or "\0" in spec:
        raise UsageError(f"{spec!r} is not a valid name for an archive")
    return _open_path(spec, cancel)


def object_lock(lock_s: int | None, mode: str | None) -> ObjectLock | None:
    """The lock that `--lock` and `--lock-mode` say, from now on."""
    if lock_s is None:
        return None
    from vmapipe.runtime.objectlock import ObjectLock

    return ObjectLock((mode or "compliance").upper(), time.time() + lock_s)


def check_lockable(spec: str, mode: str | None) -> None:
    """Check that what is stored as `spec`, or in that folder, can be locked. Raises Failure, UsageError."""
    if is_object(spec):
        return  # its output asks the bucket when it is opened
    if is_stream(spec):
        raise UsageError("--lock: what goes into a stream cannot be locked; name a file, or s3://")
    if mode:
        raise UsageError("--lock-mode is of s3://: files are immutable, or they are not")
    from vmapipe.runtime.immutable import check_folder

    check_folder(spec if os.path.isdir(spec) else os.path.dirname(spec))


def is_stream(spec: str) -> bool:
    """Return whether `spec` names a stream: a descriptor, a command, a FIFO, a device."""
    if spec == "-" or spec.startswith("exec:") or _DESCRIPTOR.fullmatch(spec):
        return True
    try:
        mode = os.stat(spec).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


def _open_path(path: str, cancel: Cancel | None) -> Output:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise open_failure("open", path, error) from error
        # A link that leads nowhere has the name all the same.
        if os.path.islink(path):
            raise exists_failure(path) from error
        return FileOutput(path, cancel=cancel)
    check_kind(mode, path)
    try:
        if stat.S_ISFIFO(mode):
            return open_fifo(path, cancel)
        if stat.S_ISSOCK(mode):
            return connect(path, cancel)
    except OSError as error:
        raise open_failure("open", path, error) from error
    if stat.S_ISCHR(mode):
        return open_device(path, cancel)
    raise exists_failure(path)

# SPDX-License-Identifier: Apache-2.0
"""A mounted archive for the kernel: libfuse calls, answered from an `ArchiveTree`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mfusepy

from vmapipe.access.mount.tree import ArchiveTree
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.syscalls import readable
from vmapipe.vma.errors import ArchiveError

# Nothing changes below the mount point, but how much a disk holds while its index is made.
_KNOWN_S = 60
# What is being read when we are asked to end gets so long.
_DRAIN_S = 2.0
# umount answers at once; a hung one must not hang us.
_UNMOUNT_S = 10.0
_BLOCK_BYTES = 4096
# A line of libfuse's.
_LINE_BYTES = 1024
_KEPT_LINES = 3
_ENCODING, _ERRORS = "utf-8", "surrogateescape"
_MAX_LINK_BYTES = 4095


def run_mount(
    tree: ArchiveTree, folder: str, name: str, cancel: Cancel, on_mounted: Callable[[], None]
) -> None:
    """Show `tree` at `folder` until somebody unmounts it, or `cancel` is asked. Raises Failure.

    libfuse has a thread of its own here and so leaves signals to `cancel`.
    """
    ours, theirs = socket.socketpair()
    calls = _Calls(tree, on_mounted)
    failed: list[str] = []

    def work() -> None:
        with _library_lines() as lines:
            try:
                _Fuse(calls, folder, **_options(name))
            except (RuntimeError, OSError) as error:
                failed[:] = lines or [f"libfuse gives up ({error})"]
            finally:
                theirs.close()

    thread = threading.Thread(target=work, name="fuse", daemon=True)
    thread.start()
    try:
        ended = ours.fileno() in readable([cancel.fd, ours.fileno()])
        if not ended:
            _unmount(folder)
            thread.join(_DRAIN_S)
    finally:
        ours.close()
    if failed and not calls.is_mounted:
        raise Failure(
            f"cannot mount on {folder}: {'; '.join(failed)}: without the right to, mount inside "
            "unshare -Urm, or use vmapipe files"
        )


@contextlib.contextmanager
def _library_lines() -> Iterator[list[str]]:
    """What libfuse would write to standard error, of which a little is of no use to anybody.

    As a C variadic function's arguments are passed on these two machines; left alone on others.
    """
    lines: list[str] = []
    set_log = getattr(mfusepy._libfuse, "fuse_set_log_func", None)  # since libfuse 3.7
    if set_log is None or platform.machine() not in ("x86_64", "aarch64"):
        yield lines
        return

    def log(_: int, template: int, arguments: int) -> None:
        buffer = ctypes.create_string_buffer(_LINE_BYTES)
        libc.vsnprintf(buffer, _LINE_BYTES, ctypes.c_void_p(template), ctypes.c_void_p(arguments))
        del lines[:-_KEPT_LINES]
        lines.append(buffer.value.decode(errors="replace").strip())

    libc = ctypes.CDLL(None)
    function = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(log)
    set_log(function)
    try:
        yield lines
    finally:
        set_log(None)


def _options(name: str) -> dict[str, Any]:
    return {
        "foreground": True,
        # The kernel of this machine does not know the owners of the guest's set-uid programs and devices.
        "nosuid": True,
        "nodev": True,
        "ro": True,
        # Options are separated by commas.
        "fsname": os.path.basename(name).replace(",", "_").replace("\\", "_"),
        "subtype": "vmapipe",
        "kernel_cache": True,
        "attr_timeout": _KNOWN_S,
        "entry_timeout": _KNOWN_S,
        "negative_timeout": _KNOWN_S,
        "encoding": _ENCODING,
        "errors": _ERRORS,
    }


def _unmount(folder: str) -> None:
    """Take the folder out of sight at once; whoever has a file of it open gets errors. Raises Failure."""
    as_root = ["umount", "-l", folder]
    words = [as_root] if os.geteuid() == 0 else []
    words.append(["fusermount3", "-u", "-z", folder])
    said = "no program that unmounts was found"
    for command in words:
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, capture_output=True, timeout=_UNMOUNT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if done.returncode == 0:
            return
        said = done.stderr.decode(errors="replace").strip()
    raise Failure(f"cannot unmount {folder} ({said}): use umount {folder}")


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """libfuse's loop, with the one call that mfusepy does not pass on: where holes are."""

    def lseek(self, path: bytes, offset: int, whence: int, _: object) -> int:
        found: int = self.operations.lseek(path.decode(_ENCODING, _ERRORS), offset, whence)
        return found


class _Calls(mfusepy.Operations):  # type: ignore[misc]
    """What libfuse asks. A path comes as text with the bytes that are not UTF-8 as surrogates."""

    use_ns = True

    def __init__(self, tree: ArchiveTree, on_mounted: Callable[[], None]) -> None:
        self._tree = tree
        self._on_mounted = on_mounted
        self.is_mounted = False

    def init(self, path: str) -> None:
        self.is_mounted = True
        self._on_mounted()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        with _as_os_error():
            return self._tree.attributes(_raw(path)).as_stat()

    def readdir(self, path: str, fh: int) -> Iterator[tuple[str, int, int]]:
        with _as_os_error():
            found = list(self._tree.names(_raw(path)))
        yield ".", 0o40000, 0
        yield "..", 0o40000, 0
        for name, kind in found:
            yield name.decode(_ENCODING, _ERRORS), kind, 0

    def open(self, path: str, flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        with _as_os_error():
            return self._tree.read(_raw(path), offset, size)

    def readlink(self, path: str) -> str:
        with _as_os_error():
            return self._tree.link_target(_raw(path))[:_MAX_LINK_BYTES].decode(_ENCODING, _ERRORS)

    def listxattr(self, path: str) -> list[str]:
        with _as_os_error():
            return [name.decode(_ENCODING, _ERRORS) for name in self._tree.xattrs(_raw(path))]

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        if not name.startswith("user."):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        with _as_os_error():
            found = self._tree.xattrs(_raw(path)).get(_raw(name))
        if found is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return found

    def lseek(self, path: str, offset: int, whence: int) -> int:
        with _as_os_error():
            return self._tree.seek(_raw(path), offset, to_hole=whence == os.SEEK_HOLE)

    def statfs(self, path: str) -> dict[str, int]:
        return {
            "f_bsize": _BLOCK_BYTES,
            "f_frsize": _BLOCK_BYTES,
            "f_blocks": -(-self._tree.size_bytes // _BLOCK_BYTES),
            "f_namemax": 255,
        }


def _raw(text: str) -> bytes:
    return text.encode(_ENCODING, _ERRORS)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """An error that has no number becomes EIO: libfuse's callers know numbers only."""
    try:
        yield
    except OSError as error:
        if not error.errno:
            raise OSError(errno.EIO, str(error)) from error
        raise
    except (Failure, ArchiveError, RuntimeError) as error:
        # RuntimeError: it is asked while the mount ends.
        raise OSError(errno.EIO, str(error)) from error

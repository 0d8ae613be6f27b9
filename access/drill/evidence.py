# SPDX-License-Identifier: Apache-2.0
"""What a restore test leaves to look at: a folder with a picture, logs and the result.

The files are named by this program only, and each is bounded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder

#: Every file that there may be.
NAMES = ("screen.png", "screen.txt", "serial.log", "firmware.log", "qemu.log", "result.json")
# A picture of a full screen has some 100 KiB, a log at most 1 MiB.
_MAX_BYTES = 8 << 20


def keep_evidence(path: str, files: Mapping[str, bytes]) -> None:
    """Write the files into the folder `path`, in place of an earlier test's. Raises Failure."""
    place, name = os.path.split(os.path.abspath(path))
    try:
        with HeldFolder(place) as above, _folder(above, name) as folder:
            for file_name in NAMES:
                _unlink(folder, file_name)
            for file_name, data in files.items():
                if file_name in NAMES and len(data) <= _MAX_BYTES:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                    with open(folder.open(file_name, flags), "wb") as file:
                        file.write(data)
    except OSError as error:
        raise Failure(f"cannot keep the evidence in {path}: {os_error_text(error)}") from error


def remove_evidence(above: HeldFolder, name: str) -> None:
    """Remove such a folder; one that holds more than that stays. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), above.folder(name) as folder:
        for file_name in NAMES:
            _unlink(folder, file_name)
        if not folder.names():
            above.remove_folder(name, folder)


def _folder(above: HeldFolder, name: str) -> HeldFolder:
    try:
        return above.make_folder(name)
    except FileExistsError:
        # Never through a link: somebody else would choose where it leads.
        folder = above.folder(name)
    if os.fstat(folder.fd).st_uid != os.geteuid():
        folder.close()
        raise PermissionError(0, "the folder belongs to another user")
    return folder


def _unlink(folder: HeldFolder, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder.fd)

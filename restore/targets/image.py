# SPDX-License-Identifier: Apache-2.0
"""New images of formats other than raw: written over NBD, through qemu-storage-daemon."""

from __future__ import annotations

import os
import shutil
import subprocess

from vmapipe.restore.errors import TargetError
from vmapipe.restore.targets.newfile import Folders, NewFile
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.storage_daemon import StorageDaemon

EXPORT = "disk"
_CREATE_S = 60.0


class NewImage(NewFile):
    """A `NewFile` whose content is an image of `size_bytes` bytes; workers write to `nbd`."""

    def __init__(self, path: str, folders: Folders, image_format: str, size_bytes: int) -> None:
        """Raises TargetError."""
        super().__init__(path, folders)
        self._daemon: StorageDaemon | None = None
        # The file has no name yet, but a path it has.
        place = f"/proc/{os.getpid()}/fd/{self.fd}"
        try:
            _create(path, place, image_format, size_bytes)
            self._daemon = StorageDaemon(
                path,
                [
                    "qemu-storage-daemon",
                    *("--blockdev", f"driver=file,node-name=file,filename={place}"),
                    *("--blockdev", f"driver={image_format},node-name=image,file=file"),
                    *("--nbd-server", "addr.type=unix,addr.path=SOCKET"),
                    *("--export", f"type=nbd,id=e,node-name=image,name={EXPORT},writable=on"),
                ],
            )
        except Failure as error:
            self.close()
            raise TargetError(str(error)) from error
        except BaseException:
            self.close()
            raise

    @property
    def nbd(self) -> str:
        """The socket that workers connect to."""
        return self._daemon.socket if self._daemon is not None else ""

    def finish(self) -> None:
        """All is written: bring it to the disk. Raises TargetError."""
        try:
            if self._daemon is not None:
                self._daemon.stop()
                self._daemon = None
            os.fsync(self.fd)
        except Failure as error:
            raise TargetError(str(error)) from error
        except OSError as error:
            raise TargetError(f"cannot write to {self.path}: {os_error_text(error)}") from error

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.close()
            self._daemon = None
        super().close()


def _create(path: str, place: str, image_format: str, size_bytes: int) -> None:
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        raise TargetError(
            f"{path}: to make a {image_format} image, qemu-img is needed (Debian: qemu-utils)"
        )
    try:
        done = subprocess.run(
            [qemu_img, "create", "-q", "-f", image_format, place, str(size_bytes)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CREATE_S,
        )
    except subprocess.TimeoutExpired:
        raise TargetError(f"{path}: qemu-img create takes longer than {_CREATE_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or "it gave no reason").splitlines()
        raise TargetError(
            f"cannot make {path}: {lines[-1].removeprefix('qemu-img: ').replace(place, path)}"
        )

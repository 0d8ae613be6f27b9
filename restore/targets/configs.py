# SPDX-License-Identifier: Apache-2.0
"""Writes an archive's configs as files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from vmapipe.restore.errors import TargetError
from vmapipe.restore.plan import Plan, check_plan, config_paths
from vmapipe.restore.targets.newfile import Folders, NewFile, publish_all
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.header import Header


def open_configs(header: Header, folder: str, folders: Folders) -> list[NewFile]:
    """All configs, written and on the disk, but without their names. Raises RestoreError.

    One that stands there already with the same content is left as it is, so that disks can
    be restored one after the other. A name that is unsafe, or taken by something else, is
    refused before anything is written.
    """
    files: list[NewFile] = []
    written: list[tuple[NewFile, bytes]] = []
    try:
        for path, config in zip(config_paths(header, folder), header.configs, strict=True):
            if not _is_there(path, config.data, folders):
                files.append(NewFile(path, folders))
                written.append((files[-1], config.data))
        for file, data in written:
            _write(file, data)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _is_there(path: str, data: bytes, folders: Folders) -> bool:
    """Whether this very config is there. Raises TargetError where something else has its name."""
    try:
        folder, name = folders.of(path)
        if folder.status(name) is None:
            return False
        fd = folder.open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and _read(fd, len(data) + 1) == data:
                return True
        finally:
            os.close(fd)
    except OSError:
        pass  # whatever it is, it is not this config
    raise TargetError(
        f"{path} exists already with another content and is not overwritten: "
        "use --no-configs, or another folder"
    )


def _read(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := os.read(fd, length - len(data))):
        data += more
    return data


def write_lines(file: NewFile, lines: Iterable[str]) -> None:
    """Write a file of text, a few lines at a time. Raises TargetError."""
    _write_all(file, (line.encode("utf-8", "surrogateescape") for line in lines))


def _write(file: NewFile, data: bytes) -> None:
    _write_all(file, [data])


def _write_all(file: NewFile, pieces: Iterable[bytes]) -> None:
    try:
        with open(file.fd, "wb", closefd=False) as out:
            for piece in pieces:
                out.write(piece)
        os.fsync(file.fd)
    except OSError as error:
        raise TargetError(f"cannot write {file.path}: {os_error_text(error)}") from error


def write_configs(header: Header, folder: str, folders: Folders) -> list[NewFile]:
    """Write all configs into the folder. Nothing is left where it fails.

    The files are open, so that they can be withdrawn; close them. Raises RestoreError,
    HeaderError.
    """
    check_plan(header, Plan(configs_folder=folder))
    files = open_configs(header, folder, folders)
    try:
        publish_all(files)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files

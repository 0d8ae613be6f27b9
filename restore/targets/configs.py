# SPDX-License-Identifier: Apache-2.0
"""Writes an archive's configs as files."""

from __future__ import annotations

import os

from vmapipe.restore.errors import TargetError
from vmapipe.restore.plan import Plan, check_plan, config_paths
from vmapipe.restore.targets.targets import NewFile, sync_folders
from vmapipe.runtime.errors import os_error_text
from vmapipe.vma.header import Header


def open_configs(header: Header, folder: str) -> list[NewFile]:
    """All configs, written and on the disk, but without their names. Raises RestoreError.

    A name that is unsafe or taken is refused before anything is written.
    """
    files: list[NewFile] = []
    try:
        for path in config_paths(header, folder):
            files.append(NewFile(path))  # noqa: PERF401  those before a failure must be closed
        for file, config in zip(files, header.configs, strict=True):
            _write(file, config.data)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _write(file: NewFile, data: bytes) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file.fd, view) :]
        os.fsync(file.fd)
    except OSError as error:
        raise TargetError(f"cannot write {file.path}: {os_error_text(error)}") from error


def publish_all(files: list[NewFile]) -> None:
    """Give all of them their names, or none; they stay open. Raises TargetError."""
    done: list[NewFile] = []
    try:
        for file in files:
            file.publish()
            done.append(file)
        sync_folders([file.path for file in files])
    except BaseException:
        for file in done:
            file.withdraw()
        raise


def write_configs(header: Header, folder: str) -> list[str]:
    """Write all configs into the folder; returns their paths. Nothing is left where it fails.

    Raises RestoreError, HeaderError.
    """
    check_plan(header, Plan(configs_folder=folder))
    files = open_configs(header, folder)
    try:
        publish_all(files)
    finally:
        for file in files:
            file.close()
    return [file.path for file in files]

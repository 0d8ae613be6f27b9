# SPDX-License-Identifier: Apache-2.0
"""The configuration of an archive's machine: the archive's own, or a file that is named instead."""

from __future__ import annotations

from vmapipe.access.machine.libvirt import looks_like_libvirt
from vmapipe.access.machine.proxmox_config import looks_like_proxmox
from vmapipe.access.machine.spec import MAX_CONFIG_BYTES
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.side_files import read_awaited
from vmapipe.vma.header import Header
from vmapipe.vma.names import CONFIG_NAME


def configuration_of(header: Header, path: str | None, cancel: Cancel) -> bytes:
    """Return the file at `path`, or the archive's configuration; empty: it has none. Raises Failure."""
    if path is not None:
        try:
            return read_awaited(path, MAX_CONFIG_BYTES + 1, cancel)
        except OSError as error:
            raise Failure(
                f"cannot read the configuration {path}: {os_error_text(error)}"
            ) from error
    # libvirt's NAME.active.xml is a machine as it ran, with names of things that were plugged in.
    ordered = sorted(header.configs, key=lambda config: config.name.endswith(".active.xml"))
    configs = {config.name: config.data for config in ordered}
    raw = configs.get(CONFIG_NAME, b"")
    for data in configs.values():
        if not raw and (looks_like_libvirt(data) or looks_like_proxmox(config_text(data))):
            raw = data
    return raw


def config_text(raw: bytes) -> str:
    return raw[:MAX_CONFIG_BYTES].decode("utf-8", "replace")

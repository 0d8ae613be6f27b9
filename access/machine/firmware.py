# SPDX-License-Identifier: Apache-2.0
"""UEFI firmware for a machine, as distributions install it, and a TPM: swtpm, with a copy of its state."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmapipe.access.machine.spec import FirmwareSpec, TpmSpec
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.storage_daemon import LastWords, dying_with_parent

# Debian and Ubuntu, Proxmox VE, Fedora and RHEL, Arch, and what QEMU itself installs.
_FOLDERS = (
    "/usr/share/OVMF",
    "/usr/share/pve-edk2-firmware",
    "/usr/share/edk2/ovmf",
    "/usr/share/edk2/x64",
    "/usr/share/qemu",
)
# Code, and a template of variables that goes with it.
_USUAL = (
    ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    ("OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"),
    ("edk2-x86_64-code.fd", "edk2-i386-vars.fd"),
)
_SECURE = (
    ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"),
    ("OVMF_CODE.secboot.4m.fd", "OVMF_VARS.4m.fd"),
    ("edk2-x86_64-secure-code.fd", "edk2-i386-vars.fd"),
)
_SMALL = (("OVMF_CODE.fd", "OVMF_VARS.fd"),)
# Of a build for 2 MiB of flash memory; the others' are 528 KiB.
_SMALL_BYTES = 128 << 10


class Firmware(NamedTuple):
    """Files of this host. `omission`: what is different from the machine's own; empty: nothing."""

    code: str
    variables: str
    variables_bytes: int
    is_secure: bool
    omission: str


def find_firmware(
    wanted: FirmwareSpec, *, is_q35: bool, folders: Sequence[str] = _FOLDERS
) -> Firmware:
    """Return the firmware that fits. Raises Failure: none is installed."""
    if wanted.is_secure and not wanted.has_small_variables:
        found = _first(folders, _SECURE) if is_q35 else None
        if found:
            return Firmware(*found, True, "")
        why = "secure boot is off: it needs a q35 machine and firmware for it"
    elif wanted.has_small_variables:
        found = _first(folders, _SMALL)
        if found and found[2] == _SMALL_BYTES:
            return Firmware(*found, False, "")
        why = "no firmware for its small variables (efitype=2m) is installed: it has new ones"
    else:
        why = ""
    found = _first(folders, _USUAL) or _first(folders, _SMALL)
    if found is None:
        raise Failure(
            "the machine has UEFI firmware, and none is installed here (Debian: ovmf; looked into "
            f"{', '.join(folders)})"
        )
    return Firmware(*found, False, why)


def _first(folders: Sequence[str], names: Sequence[tuple[str, str]]) -> tuple[str, str, int] | None:
    return next(_there(folders, names), None)


def _there(
    folders: Sequence[str], names: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, int]]:
    for folder in folders:
        for code, variables in names:
            paths = (os.path.join(folder, code), os.path.join(folder, variables))
            if all(os.access(path, os.R_OK) for path in paths):
                yield *paths, os.stat(paths[1]).st_size


_START_S = 10.0
_POLL_S = 0.02
_END_S = 5.0
#: As Proxmox VE's volumes are, and what swtpm takes as one file.
STATE_BYTES = 4 << 20


class Tpm:
    """One swtpm that listens on `socket`; it ends with `close`, with QEMU, or with us."""

    def __init__(self, spec: TpmSpec, state: str, socket: str, cancel: Cancel) -> None:
        """`state`: the file of its state. Raises Failure, Cancelled."""
        program = shutil.which("swtpm")
        if program is None:
            raise Failure("swtpm is not installed here (Debian: swtpm)")
        words = [program, "socket", *(["--tpm2"] if spec.version == "2.0" else [])]
        words += [
            "--tpmstate",
            f"backend-uri=file://{state}",
            "--ctrl",
            f"type=unixio,path={socket}",
        ]
        words += ["--flags", "startup-clear", "--terminate"]
        self._process = subprocess.Popen(
            [*dying_with_parent("KILL"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._words = LastWords(self._process.stderr) if self._process.stderr else None
        deadline = time.monotonic() + _START_S
        try:
            while not os.path.exists(socket):
                cancel.check()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    said = self._words.last if self._words else ""
                    raise Failure(f"swtpm does not start: {said or 'it says nothing'}")
                time.sleep(_POLL_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        if self._words is not None:
            self._words.finish()

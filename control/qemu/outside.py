# SPDX-License-Identifier: Apache-2.0
"""What a machine stores outside of QEMU's block layer, where no backup job of QEMU reaches. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Answer = Mapping[str, Any]

#: As Proxmox VE's vzdump calls the state of a TPM in an archive.
TPM_NAME = "drive-tpmstate0-backup"

_ELSEWHERE = "another process has its data ({}), and QEMU cannot read it: back it up there"
_PASSED = "a device of the host is passed through ({}): what is stored on it is not in the archive"
_PERSISTENT = "it is persistent memory ({}), no disk: back its file up when the machine is off"
_TPM = (
    "the state of the TPM {!r}: {}; a guest that seals its keys with it (BitLocker, LUKS) may ask "
    "for its recovery key when it is restored without"
)
_CHIP = "the TPM is a chip of this host, whose state cannot be copied"
# QEMU's types of devices. What QEMU 7.2 to 11.1 have of them is in all three.
_KINDS: Sequence[tuple[re.Pattern[str], str, str]] = (
    (re.compile(r"vhost-user-(?:blk|scsi|device)|vhost-scsi|vhost-vdpa"), "warn", _ELSEWHERE),
    (re.compile(r"nvdimm|virtio-pmem|cxl-type3"), "warn", _PERSISTENT),
    (re.compile(r"vfio-|usb-host"), "info", _PASSED),
)
_CHILD = re.compile(r"child<(.+)>")


class Outside(NamedTuple):
    """`words`: what it may be asked for by; `level`: how much a person has to know of it."""

    name: str
    words: frozenset[str]
    reason: str
    level: str


def found_outside(devices: Mapping[str, Sequence[Answer]]) -> list[Outside]:
    """From the answers to qom-list, by path (/machine/peripheral and -anon)."""
    found = []
    for path, entries in devices.items():
        for entry in entries:
            name, child = str(entry.get("name", "")), _CHILD.fullmatch(str(entry.get("type", "")))
            for pattern, level, reason in _KINDS if child else ():
                if child and pattern.match(child[1]):
                    named = f"drive-{name.removeprefix('drive-')}"
                    if path.endswith("-anon"):
                        named = f"{path}/{name}"
                    words = frozenset({name, named, f"{path}/{name}"})
                    found.append(Outside(named, words, reason.format(child[1]), level))
                    break
    return found


def tpm_words(tpm: Answer) -> frozenset[str]:
    """What the state of a TPM may be asked for by, from an entry of query-tpm."""
    return frozenset({str(tpm.get("id", "")), TPM_NAME, "tpmstate0"} - {""})


def is_emulated(tpm: Answer) -> bool:
    """By swtpm, which keeps its state in files."""
    return (tpm.get("options") or {}).get("type") == "emulator"


def tpm_outside(tpm: Answer, why: str) -> Outside:
    """`why` its state cannot be had."""
    name = str(tpm.get("id", ""))
    reason = _TPM.format(name, why) if is_emulated(tpm) else _CHIP
    return Outside(TPM_NAME, tpm_words(tpm), reason, "warn")

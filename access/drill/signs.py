# SPDX-License-Identifier: Apache-2.0
"""What boot loaders, kernels and login programs say: texts that mean failure, and a login prompt. Pure.

No pattern here can take long: none repeats what repeats.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

# A console's colours and cursor movements: ECMA-48's control sequences, and the short ones.
_CONTROLS = re.compile(r"\x1b\[[0-?]{0,40}[ -/]{0,4}[@-~]|\x1b[()][0-9A-Za-z]|\x1b[@-Z\\-_78=>]")
#: As getty and others ask for a name; and the prompt of Windows' serial console.
LOGIN = re.compile(r"(?:^|[ \t>])login:(?:\s|$)|^SAC>", re.MULTILINE)

Weight = Literal["final", "stuck"]


class Sign(NamedTuple):
    """A text that means failure. `final`: nothing follows it; `stuck`: if nothing follows it."""

    weight: Weight
    text: str


_FINAL = (
    ("the kernel has panicked", r"Kernel panic - not syncing[^\n]{0,200}|---\[ end Kernel panic"),
    ("the firmware finds nothing to boot", r"No bootable device\.|^Shell> ?"),
    (
        "the firmware finds nothing to boot",
        r"BdsDxe: No bootable option or device was found|No bootable option or device was found",
    ),
)
_STUCK = (
    ("the boot loader's rescue prompt", r"^grub rescue> ?|^grub> ?|^ ?Entering rescue mode"),
    ("the boot loader cannot start the kernel", r"Invalid or corrupt kernel image|Booting kernel failed: [^\n]{0,60}"),
    ("the boot loader finds no kernel that it can start", r"Could not find kernel image[^\n]{0,80}"),
    ("the boot loader finds no kernel that it can start", r"^error: [^\n]{0,120}(?:not found|invalid magic|no such|unknown filesystem|you need to load the kernel)[^\n]{0,80}"),
    ("the boot loader cannot start the kernel", r"Error loading \\[^\n]{0,100}|Error (?:opening|preparing) [^\n]{0,100}: [^\n]{0,60}|Failed to (?:execute|load|start) [^\n]{0,100}\\(?!x[0-9a-f]{2})[A-Za-z][^\n]{0,60}|start_image\(\) returned [^\n]{0,60}"),
    ("the firmware cannot boot the disk", r"Boot failed: [^\n]{0,80}|BdsDxe: failed to (?:load|start) [^\n]{0,200}"),
    ("the disk's boot sector cannot go on", r"Missing operating system|Operating [Ss]ystem not found|Error loading operating system|Invalid partition table|Non-System disk[^\n]{0,40}|NTLDR is missing|BOOTMGR is missing[^\n]{0,40}|A disk read error occurred|FATAL: No bootable medium found|Missing boot loader|isolinux\.bin missing|^boot:\s*$"),
    ("the initial RAM disk has no root file system to mount", r"ALERT! [^\n]{0,160}|Gave up waiting for (?:root|suspend)[^\n]{0,80}|^\(initramfs\) ?|dracut-initqueue\S{0,40}: Warning: [^\n]{0,100}timeout|Unable to (?:mount|find) root[^\n]{0,120}|Cannot open root device[^\n]{0,120}"),
    ("the system has stopped for repair", r"You are in (?:emergency|rescue) mode|Entering emergency mode|Give root password for maintenance|Cannot open access to console, the root account is locked|UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY"),
    ("the machine runs on, but its kernel has failed", r"Attempted to kill init|BUG: unable to handle [^\n]{0,120}"),
    ("Windows cannot start", r"Windows failed to start|Your PC(?:/Device)? needs to be repaired|INACCESSIBLE_BOOT_DEVICE"),
    ("the firmware turns to the network, the disks did not boot", r">>Start (?:PXE|HTTP) |iPXE \(http"),
)  # fmt: skip


def _compiled(table: tuple[tuple[str, str], ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(reason, re.compile(pattern, re.MULTILINE)) for reason, pattern in table]


_TABLES: tuple[tuple[Weight, list[tuple[str, re.Pattern[str]]]], ...] = (
    ("final", _compiled(_FINAL)),
    ("stuck", _compiled(_STUCK)),
)


def plain(text: str) -> str:
    """Return a console's text without its control sequences, lines ended by a line feed."""
    text = _CONTROLS.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c == "\n" or c.isprintable() else " " for c in text)


def failure_in(text: str) -> Sign | None:
    """Return the gravest sign in a plain text, with the words themselves; None: there is none."""
    for weight, table in _TABLES:
        for reason, pattern in table:
            if match := pattern.search(text):
                words = " ".join(match[0].split())
                return Sign(weight, f"{reason}: {words!r}")
    return None

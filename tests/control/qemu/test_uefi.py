# SPDX-License-Identifier: Apache-2.0
"""A guest with UEFI firmware: what the firmware remembers is one of the machine's disks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.control.qemu.running_guest import OBEY, Extra, make_images, running_guest
from tests.guest import EFI_MODULES, Kernel
from tests.machine import Need, end_of, good, next_event, started

_OVMF = Path("/usr/share/OVMF")
# A vendor's own: firmware keeps it and does nothing with it.
_VENDOR = "5a1f2cb0-7d0e-4f61-9a55-0c7f6a1be1d2"
_MOUNT = f"""
mount -t efivarfs efivarfs /sys/firmware/efi/efivars
ls /sys/firmware/efi/efivars | grep -e -{_VENDOR}$ >/tmp/kept || true
"""
# Kept without power, seen by the running system.
_ATTRIBUTES = r"\007\000\000\000"


@pytest.fixture
def firmware() -> Path:
    """Debian's, which boots within seconds where nothing is emulated twice."""
    code = _OVMF / "OVMF_CODE_4M.fd"
    if not code.exists():
        absent("ovmf")
    return code


def with_firmware(code: Path, variables: Path) -> Extra:
    options = (
        *("-m", "256"),  # the firmware leaves the kernel too little of 128
        *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
    )
    return Extra(options, EFI_MODULES, {}, _MOUNT + OBEY)


def set_variable(name: str) -> str:
    """What the guest's shell does for it; a variable is set by one write."""
    path = f"/sys/firmware/efi/efivars/{name}-{_VENDOR}"
    return f"printf '{_ATTRIBUTES}{name}' > {path}"


def back_up(need: Need, kernel: Kernel, firmware: Path, folder: Path) -> Path:
    """All disks, restored as they were between the variables `Before` and `After`; their folder."""
    archive, restored, variables = (folder / name for name in ("vm.vma", "out", "variables.fd"))
    shutil.copy(_OVMF / "OVMF_VARS_4M.fd", variables)
    extra = with_firmware(firmware, variables)
    with running_guest(need, kernel, folder, make_images(need, folder), extra=extra) as guest:
        guest.next_round()
        guest.does(set_variable("Before"))
        words = ("backup", "--json", "--qmp", guest.qmp, "--speed", "48M", archive)
        with started(*words) as process:
            next_event(process, "instant")
            guest.does(set_variable("After"))
            assert end_of(process)[0] == 0
        guest.goes_on(1)
        guest.is_untouched()
    assert knows(variables, "After")
    good("restore", archive, restored)
    assert (restored / "disk-drive-efidisk0.raw").stat().st_size == variables.stat().st_size
    return restored


def knows(variables: Path, name: str) -> bool:
    """UEFI's strings are UTF-16."""
    return f"{name}\0".encode("utf-16-le") in variables.read_bytes()


def test_what_firmware_remembers_is_backed_up_at_the_instant_of_the_disks(
    qemu: str, need: Need, kernel: Kernel, firmware: Path, tmp_path: Path
) -> None:
    variables = back_up(need, kernel, firmware, tmp_path) / "disk-drive-efidisk0.raw"
    assert knows(variables, "Before")
    assert not knows(variables, "After")


@pytest.mark.slow  # it boots twice
def test_a_machine_with_uefi_firmware_boots_from_what_was_restored(
    qemu: str, need: Need, kernel: Kernel, firmware: Path, tmp_path: Path
) -> None:
    restored, again = back_up(need, kernel, firmware, tmp_path), tmp_path / "again"
    again.mkdir()
    extra = with_firmware(firmware, restored / "disk-drive-efidisk0.raw")
    disks = [restored / f"disk-drive-virtio{index}.raw" for index in (0, 1)]
    with running_guest(need, kernel, again, disks, extra=extra) as guest:
        guest.next_round()
        guest.console.tell("say $(cat /tmp/kept)")
        said = guest.console.hear_next()
        while said.startswith("round "):
            said = guest.console.hear_next()
        assert said == f"Before-{_VENDOR}"

# SPDX-License-Identifier: Apache-2.0
"""The sessions of docs/operations/access.md: its blocks of commands, and a folder to run them in."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.access.volumes import EXTENT_BYTES, KEY, ROOT, encrypted, physical_volumes, put
from tests.machine import LIMIT_S, Need, good

PAGE = Path(__file__).parents[2] / "docs" / "operations" / "access.md"
FSTAB = "/dev/vda1 / ext4\n"
_PART_AT = 1 << 20
# What a block that fails has left in the background would keep its output open.
_END_ALL = "trap 'code=$?; kill $(jobs -p) 2>&- || :; wait; exit $code' EXIT"


class Session(NamedTuple):
    """A block of a heading; `number`: the heading's first is 1."""

    title: str
    number: int
    script: str


def sessions() -> list[Session]:
    """All blocks of the page's section "Sessions"."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## Sessions\n")[2].partition("\n## ")[0]
    found = []
    for part in text.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        blocks = re.findall(r"^```sh\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
        found += [Session(title, number, block) for number, block in enumerate(blocks, 1)]
    return found


def make_archives(folder: Path, need: Need) -> None:
    """What the sessions name: vm.vma.zst, vzdump-qemu-100.vma.zst, three.vma, drive-scsi0.raw, backup.key."""
    zstd, mke2fs = need("zstd", "mke2fs")
    (folder / "tree/etc").mkdir(parents=True)
    (folder / "tree/etc/fstab").write_text(FSTAB)
    file_system = _file_system(folder, mke2fs, "12M")
    table = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", _PART_AT // 512, len(file_system) // 512)
    with (folder / "drive-scsi0.raw").open("wb") as disk:
        disk.write(bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa")
        disk.seek(_PART_AT)
        disk.write(file_system)
    (folder / "qemu-server.conf").write_text("memory: 512\nscsi0: local:100/disk.raw\n")
    config = ("--config", folder / "qemu-server.conf")
    first = ("--disk", f"drive-scsi0={folder}/drive-scsi0.raw")
    good("backup", "--quiet", "--compress", "zstd", *config, *first, folder / "vm.vma.zst")
    plain = subprocess.check_output([zstd, "-dcq", folder / "vm.vma.zst"])
    one_piece = subprocess.run([zstd, "-cq"], input=plain, capture_output=True, check=True).stdout
    (folder / "vzdump-qemu-100.vma.zst").write_bytes(one_piece)
    volumes = physical_volumes()
    put(volumes, ROOT, _file_system(folder, mke2fs, f"{len(ROOT) * EXTENT_BYTES >> 10}k"))
    for number, name in enumerate("ab"):
        (folder / f"drive-scsi{number}").write_bytes(volumes[name])
    encrypted(need, _file_system(folder, mke2fs, "4M"), folder / "drive-scsi2")
    (folder / "backup.key").write_bytes(KEY)
    disks = [word for n in range(3) for word in ("--disk", f"{folder}/drive-scsi{n},format=raw")]
    good("backup", "--quiet", *disks, folder / "three.vma")


def _file_system(folder: Path, mke2fs: str, size: str) -> bytes:
    image = folder / "image"
    image.unlink(missing_ok=True)
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-d", folder / "tree", image, size], check=True)
    return image.read_bytes()


def run_session(script: str, folder: Path, archives: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a block as a shell would that stops at the first failure, with the archives at hand."""
    for path in archives.iterdir():
        if path.is_file():
            os.link(path, folder / path.name)
    command = folder / "bin/vmapipe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m vmapipe.control.main "$@"\n')
    command.chmod(0o755)
    programs = f"{command.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    variables = {**os.environ, "PATH": programs, "XDG_CACHE_HOME": str(folder)}
    bash = shutil.which("bash") or "bash"
    return subprocess.run(
        [bash, "-eu", "-o", "pipefail", "-c", f"{_END_ALL}\n{script}"],
        cwd=folder,
        env=variables,
        capture_output=True,
        timeout=LIMIT_S,
    )

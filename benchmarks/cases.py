# SPDX-License-Identifier: Apache-2.0
"""What is measured, on which images, against whom."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from benchmarks.measure import Case, Command

MIB = 1 << 20
VMAPIPE = (sys.executable, "-P", "-m", "vmapipe.control.main")


def image_paths(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{name}.raw" for name in ("dense", "sparse")}


def make_images(folder: Path, size_mib: int) -> None:
    """`dense`: random bytes. `sparse`: a quarter of them, in pieces of 1 MiB, the rest holes."""
    images = image_paths(folder)
    chance = random.Random(1)
    with images["dense"].open("wb") as dense, images["sparse"].open("wb") as sparse:
        sparse.truncate(size_mib * MIB)
        for index in range(size_mib):
            piece = chance.randbytes(MIB)
            dense.write(piece)
            if index % 4 == 0:
                sparse.seek(index * MIB)
                sparse.write(piece)
    os.sync()


def make_image(path: Path, size_mib: int) -> Path:
    """Random bytes."""
    chance = random.Random(2)
    with path.open("wb") as image:
        for _ in range(size_mib):
            image.write(chance.randbytes(MIB))
    return path


def vmapipe(*words: str | Path) -> list[str]:
    return [*VMAPIPE, *map(str, words)]


def all_cases(folder: Path, images: dict[str, Path], size_mib: int) -> list[Case]:
    return [
        case
        for kind, image in images.items()
        for case in (
            _backup_to_nothing(kind, image, size_mib),
            _backup_to_pipe(kind, image),
            _backup_to_file(kind, image, folder),
            _restore(kind, image, folder),
            _verify(kind, folder),
        )
    ]


def _backup(image: Path, target: str | Path, *more: str) -> list[str]:
    return vmapipe("backup", "--quiet", "--disk", f"drive-scsi0={image}", *more, target)


def _backup_to_nothing(kind: str, image: Path, size_mib: int) -> Case:
    null = f"driver=null-co,size={size_mib * MIB}"
    return Case(
        f"backup {kind} to nothing",
        Command("vmapipe", _backup(image, "/dev/null")),
        [
            Command("dd bs=1M", ["dd", f"if={image}", "of=/dev/null", "bs=1M"]),
            Command("nbdcopy", ["nbdcopy", str(image), "null:"], needs="nbdcopy"),
            Command(
                "qemu-img convert",
                ["qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", str(image), null],
                needs="qemu-img",
            ),
        ],
        goal="dense: at most 3 x dd" if kind == "dense" else "",
    )


def _backup_to_pipe(kind: str, image: Path) -> Case:
    words = " ".join(_backup(image, "-"))
    return Case(
        f"backup {kind} to a pipe",
        Command("vmapipe", f"{words} | cat >/dev/null"),
        [Command("dd bs=1M", f"dd if={image} bs=1M | cat >/dev/null")],
    )


def _backup_to_file(kind: str, image: Path, folder: Path) -> Case:
    archive = folder / f"{kind}.vma"
    out = folder / "peer.raw"
    return Case(
        f"backup {kind} to a file",
        Command("vmapipe", _backup(image, archive), makes=archive),
        [
            Command(
                "dd conv=fdatasync",
                ["dd", f"if={image}", f"of={out}", "bs=1M", "conv=fdatasync"],
                makes=out,
            ),
            Command("cp, sync", f"cp --sparse=auto {image} {out} && sync {out}", makes=out),
            Command(
                "nbdcopy --flush", ["nbdcopy", "--flush", str(image), str(out)], out, "nbdcopy"
            ),
            Command(
                "vmapipe --no-manifest",
                _backup(image, archive.with_suffix(".bare.vma"), "--no-manifest"),
                archive.with_suffix(".bare.vma"),
            ),
        ],
    )


def _restore(kind: str, image: Path, folder: Path) -> Case:
    archive = folder / f"{kind}.vma"
    target = folder / "restored"
    out = folder / "peer.raw"
    return Case(
        f"restore {kind} to a new file",
        Command("vmapipe", vmapipe("restore", "--quiet", archive, target), makes=target),
        [
            Command(
                "dd conv=fdatasync",
                ["dd", f"if={image}", f"of={out}", "bs=1M", "conv=fdatasync"],
                makes=out,
            ),
            Command("cp, sync", f"cp --sparse=auto {image} {out} && sync {out}", makes=out),
            Command(
                "nbdcopy --flush", ["nbdcopy", "--flush", str(image), str(out)], out, "nbdcopy"
            ),
        ],
    )


def _verify(kind: str, folder: Path) -> Case:
    archive = folder / f"{kind}.vma"
    return Case(
        f"verify {kind}",
        Command("vmapipe", vmapipe("verify", "--quiet", archive)),
        [
            Command("cat", f"cat {archive} >/dev/null"),
            Command("xxhsum -H2", ["xxhsum", "-H2", str(archive)], needs="xxhsum"),
            Command("sha256sum", ["sha256sum", str(archive)]),
            Command(
                "vmapipe --no-manifest", vmapipe("verify", "--quiet", "--no-manifest", archive)
            ),
        ],
    )

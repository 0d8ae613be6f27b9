# SPDX-License-Identifier: Apache-2.0
"""What is measured without a bound: other ways in and out, larger disks, more of them."""

from __future__ import annotations

import shlex

from benchmarks import images
from benchmarks.measure import OURS, Case, Command
from benchmarks.place import Place, backup, dd_from_pipe, make_archives, vmapipe

_SIZES_GIB = (1, 4, 16, 64)
_DEVICES = (1, 2, 4, 8, 16, 32)
_DEVICE_MIB = 16


def extra_cases(place: Place) -> list[Case]:
    return [
        _to_pipe(place),
        _restore_from_pipe(place),
        _sizes(place),
        _devices(place),
    ]


def _to_pipe(place: Place) -> Case:
    return Case(
        f"backup, dense, {place.small_mib} MiB, into a pipe",
        [
            Command(OURS, f"{shlex.join(backup(place.small, '-'))} | cat >/dev/null"),
            Command("dd bs=1M", f"dd if={place.small} bs=1M status=none | cat >/dev/null"),
        ],
        pinned=False,
        warm=[place.small],
    )


def _restore_from_pipe(place: Place) -> Case:
    archive = place.archive(place.small)
    target, out = place.disk / "restored", place.disk / "peer.raw"
    restore = shlex.join(vmapipe("restore", "--quiet", "-", target))
    return Case(
        f"restore, dense, {place.small_mib} MiB, from a pipe to a new file, flushed",
        [
            Command(OURS, f"cat {archive} | {restore}", target),
            Command(
                "dd conv=fdatasync",
                f"cat {place.small} | {shlex.join(dd_from_pipe(out))}",
                out,
            ),
        ],
        pinned=False,
        before=lambda: make_archives(place),
        leaves=[target, out],
        warm=[archive, place.small],
    )


def _sizes(place: Place) -> Case:
    """A 64th of each is data."""
    paths = {gib: place.disk / f"sparse-{gib}.raw" for gib in _SIZES_GIB}

    def before() -> None:
        for gib, path in paths.items():
            images.sparse(path, gib << 30, 16 * gib)

    return Case(
        "backup to nothing as the disk grows, a 64th of it data",
        [Command(f"vmapipe, {gib} GiB", backup(path, "/dev/null")) for gib, path in paths.items()],
        pinned=False,
        before=before,
        leaves=list(paths.values()),
    )


def _devices(place: Place) -> Case:
    image = place.disk / "device.raw"

    def words(count: int) -> list[str]:
        disks = [word for n in range(count) for word in ("--disk", f"d{n}={image}")]
        return vmapipe("backup", "--quiet", *disks, "/dev/null")

    return Case(
        f"backup to nothing of more disks, dense, {_DEVICE_MIB} MiB each",
        [Command(f"vmapipe, {count} disks", words(count)) for count in _DEVICES],
        pinned=False,
        before=lambda: images.dense(image, _DEVICE_MIB),
        leaves=[image],
    )

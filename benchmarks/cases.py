# SPDX-License-Identifier: Apache-2.0
"""The work that has a bound, and against whom it is measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from benchmarks import images
from benchmarks.images import MIB
from benchmarks.measure import OURS, Bound, Case, Command
from benchmarks.options import curve, encryption, manifest
from benchmarks.place import Place, backup, dd, dd_from_pipe, make, make_archives, vmapipe

REFERENCE = "reference vma create"


def bound_cases(place: Place) -> list[Case]:
    """In an order in which what one makes, another needs.

    A case has a row of the table for each of its bounds, beside the peer that this names, which
    runs in the same rounds. Here are disks at rest and archives on disk; what an option costs is in options.py.
    """
    return [
        _start_up(place),
        *_life(place),
        _dense_to_nothing(place),
        _zeroes_to_nothing(place),
        _quarter_to_nothing(place),
        _incremental(place),
        _nbd_to_nothing(place, "dense", place.dense),
        _nbd_to_nothing(place, "25 % data and holes", place.quarter),
        _qcow2_to_nothing(place, "dense", place.dense),
        _qcow2_to_nothing(place, "25 % data and holes", place.quarter),
        _tib_to_nothing(place),
        _many_disks(place),
        _dense_to_file(place),
        manifest(place),
        encryption(place),
        _verify_plain(place),
        _verify_manifest(place),
        _restore_existing(place),
        _restore_new(place),
        _restore_quarter(place),
        _restore_from_zstd(place),
        _zstd(place),
        curve(place),
    ]


def _start_up(place: Place) -> Case:
    image = place.disk / "start.raw"
    return Case(
        "backup of a 1 MiB disk (start-up)",
        [
            Command(OURS, backup(image, "/dev/null")),
            Command(
                "python3 -c 'import zmq, msgpack'", [sys.executable, "-c", "import zmq, msgpack"]
            ),
        ],
        [Bound("at most 6 x", OURS, "python3 -c 'import zmq, msgpack'", 6.0)],
        before=lambda: images.dense(image, 1),
        leaves=[image],
    )


def _life(place: Place) -> list[Case]:
    """What of a job's life is ours: until the disk is opened, and when all of it has been read."""
    image = place.disk / "life.raw"
    words = vmapipe("backup", "--json", "--disk", f"d={image}", "/dev/null")
    return [
        Case(
            f"backup of a disk at rest, 16 MiB: {what}",
            [Command(OURS, words, since=since, until=until)],
            [Bound(f"at most {limit} s", OURS, "", limit)],
            before=lambda: images.dense(image, 16),
            leaves=[image],
        )
        for what, since, until, limit in (
            ("from the command to the instant", "", "reading", 0.25),
            ("from the last byte to the prompt", "transfer", "", 0.1),
        )
    ]


def _dense_to_nothing(place: Place) -> Case:
    null = f"driver=null-co,size={place.size_mib * MIB}"
    convert = ["qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", str(place.dense)]
    return Case(
        "backup, dense, to nothing",
        [
            Command(OURS, backup(place.dense, "/dev/null")),
            Command("dd bs=1M", dd(place.dense, "/dev/null")),
            Command("nbdcopy", ["nbdcopy", str(place.dense), "null:"], needs="nbdcopy"),
            Command("qemu-img convert", [*convert, null], needs="qemu-img"),
            *_reference_create(place, place.dense, "exec:cat >/dev/null"),
        ],
        [
            Bound("at most 2 x dd, 2.5 x on one core", OURS, "dd bs=1M", 2.0, one_core=2.5),
            Bound(
                *("at most half of the C tool's, for each GiB", OURS, REFERENCE, 0.5),
                cpu=True,
                gib=place.size_mib / 1024,
            ),
        ],
        warm=[place.dense],
    )


def _reference_create(place: Place, image: Path, target: str) -> list[Command]:
    if place.reference is None:
        return []
    words = [place.reference, "create", target, "-d", f"format=raw:drive-scsi0={image}"]
    makes = None if target.startswith("exec:") else Path(target)
    return [Command(REFERENCE, words, makes)]


def _zeroes_to_nothing(place: Place) -> Case:
    return Case(
        "backup, zeroes that are no holes, to nothing",
        [
            Command(OURS, backup(place.zeroes, "/dev/null")),
            Command("dd bs=1M", dd(place.zeroes, "/dev/null")),
            *_reference_create(place, place.zeroes, "exec:cat >/dev/null"),
        ],
        [Bound("at most 1.3 x dd", OURS, "dd bs=1M", 1.3)],
        before=lambda: images.zeroes(place.zeroes, place.size_mib),
        leaves=[place.zeroes],
        warm=[place.zeroes],
    )


def _quarter_to_nothing(place: Place) -> Case:
    return Case(
        "backup, 25 % data and holes, to nothing",
        [
            Command(OURS, backup(place.quarter, "/dev/null")),
            Command("vmapipe, dense", backup(place.dense, "/dev/null")),
            Command("nbdcopy", ["nbdcopy", str(place.quarter), "null:"], needs="nbdcopy"),
            *_reference_create(place, place.quarter, "exec:cat >/dev/null"),
        ],
        [
            Bound("at most 0.35 x the dense one", OURS, "vmapipe, dense", 0.35),
            Bound("at most 1.5 x nbdcopy", OURS, "nbdcopy", 1.5),
        ],
        warm=[place.quarter, place.dense],
    )


def _incremental(place: Place) -> Case:
    """Both read the whole disk and write the whole archive; only what is sent differs.

    A quarter of the size: it writes three archives a round, and the ratio is that of the large one.
    """
    image = place.disk / "incremental.raw"
    base = place.disk / "incremental-2026-01-01.vma"
    new, full = place.disk / "incremental-2026-01-02.vma", place.disk / "incremental-full.vma"

    def before() -> None:
        images.copied(image, place.small)
        make(backup(image, base, "--base=auto"))
        images.one_percent_changed(image)

    return Case(
        "backup of a disk at rest of which 1 % has changed, with a base, to a file",
        [
            Command(OURS, backup(image, new, f"--base={base}"), new),
            Command("vmapipe, full", backup(image, full), full),
        ],
        # SHA-256 of all that is read is 0.7 s a GiB, where a full backup takes about 1.1; and the base is read
        # and checked, which costs no more than 0.2: most of the archiver's time is the writing of the file, as in
        # a full backup. Measured 1.6 x.
        [Bound("at most 2 x a full one", OURS, "vmapipe, full", 2.0)],
        pinned=False,
        before=before,
        leaves=[
            image,
            *(path for one in (base, new) for path in (one, *_beside(one))),
            full,
            *_beside(full),
        ],
        warm=[image, base],
        warm_up=False,
    )


def _beside(archive: Path) -> list[Path]:
    return [Path(f"{archive}{suffix}") for suffix in (".manifest.json", ".digests")]


def _nbd_to_nothing(place: Place, what: str, image: Path) -> Case:
    """Each time a server of its own, which both pay for alike; pairs in turn."""

    def pulled(command: str) -> str:
        server = shlex.join(["nbdkit", "-r", "-U", "-", "file", str(image), "--run"])
        return f"{server} {shlex.quote(command)}"

    ours = shlex.join(vmapipe("backup", "--quiet", "--nbd"))
    return Case(
        f"backup of an NBD export, {what}, to nothing",
        [
            Command(OURS, pulled(f'{ours} "d=$uri" /dev/null'), needs="nbdkit"),
            Command("nbdcopy", pulled('nbdcopy "$uri" null:'), needs="nbdcopy"),
        ],
        # 0.9 of its speed.
        [Bound("at most 1.11 x nbdcopy", OURS, "nbdcopy", 1.11)],
        pinned=False,
        warm=[image],
    )


def _qcow2_to_nothing(place: Place, what: str, raw: Path) -> Case:
    image = place.disk / "image.qcow2"
    read = ["-n", "-f", "qcow2", "--target-is-zero", "--target-image-opts", str(image)]
    null = f"driver=null-co,size={place.size_mib * MIB}"
    return Case(
        f"backup of a qcow2 image, {what}, to nothing",
        [
            Command(
                OURS,
                vmapipe("backup", "--quiet", "--disk", f"d={image},format=qcow2", "/dev/null"),
                needs="qemu-storage-daemon",
            ),
            Command("qemu-img convert", ["qemu-img", "convert", *read, null], needs="qemu-img"),
        ],
        [Bound("at most 2 x qemu-img convert", OURS, "qemu-img convert", 2.0)],
        pinned=False,
        before=lambda: images.qcow2(image, raw),
        leaves=[image],
        warm=[image],
    )


def _tib_to_nothing(place: Place) -> Case:
    return Case(
        "backup, 1 TiB with 64 MiB of data, to nothing",
        [
            Command(OURS, backup(place.tib, "/dev/null")),
            Command("vmapipe, dense", backup(place.dense, "/dev/null")),
        ],
        [Bound("at most 2.5 x the dense one", OURS, "vmapipe, dense", 2.5)],
        warm=[place.tib, place.dense],
    )


def _many_disks(place: Place) -> Case:
    image = place.disk / "device.raw"
    disks = [word for n in range(32) for word in ("--disk", f"d{n}={image}")]
    return Case(
        "backup of 32 disks of 16 MiB, to nothing",
        [Command(OURS, vmapipe("backup", "--quiet", *disks, "/dev/null"))],
        [Bound("at most 0.6 s of CPU", OURS, "", 0.6, cpu=True)],
        before=lambda: images.dense(image, 16),
        leaves=[image],
    )


def _dense_to_file(place: Place) -> Case:
    out = place.disk / "peer.raw"
    return Case(
        "backup, dense, to a file on disk, flushed",
        [
            Command(
                OURS, backup(place.dense, place.archive(place.dense)), place.archive(place.dense)
            ),
            Command("dd conv=fdatasync", dd(place.dense, out, "conv=fdatasync"), out),
            *_reference_create(place, place.dense, str(place.disk / "reference.vma")),
        ],
        [Bound("at most 1.1 x dd conv=fdatasync", OURS, "dd conv=fdatasync", 1.1)],
        pinned=False,
        warm=[place.dense],
        leaves=[out, place.disk / "reference.vma"],
        warm_up=False,
    )


def _verify_plain(place: Place) -> Case:
    archive = place.archive(place.dense)
    peers = [Command("cat", f"cat {shlex.quote(str(archive))} >/dev/null")]
    if place.reference:
        peers.append(Command("reference vma verify", [place.reference, "verify", str(archive)]))
    return Case(
        "verify, without the manifest",
        [Command(OURS, vmapipe("verify", "--quiet", "--no-manifest", archive)), *peers],
        [Bound("at most 0.5 x cat", OURS, "cat", 0.5)],
        before=lambda: make_archives(place),
        warm=[archive],
    )


def _verify_manifest(place: Place) -> Case:
    archive = place.archive(place.dense)
    return Case(
        "verify, with the manifest",
        [
            Command(OURS, vmapipe("verify", "--quiet", "--require-manifest", archive)),
            Command("xxhsum -H2", ["xxhsum", "-H2", str(archive)], needs="xxhsum"),
        ],
        [
            Bound(
                "at most 1.3 x xxhsum, divided by the cores", OURS, "xxhsum -H2", 1.3, per_core=True
            )
        ],
        before=lambda: make_archives(place),
        warm=[archive],
    )


def _restore_existing(place: Place) -> Case:
    archive = place.archive(place.dense)
    target = place.memory / "target.raw"
    commands = [
        Command(
            OURS,
            vmapipe(
                *("restore", "--quiet", archive, place.memory),
                *("--device", f"drive-scsi0={target}"),
            ),
        ),
        Command("dd conv=notrunc", dd(place.dense, target, "conv=notrunc")),
    ]
    if place.reference:
        words = shlex.join([place.reference, "extract", "-r", "/dev/stdin", str(archive)])
        out = place.memory / "configs"
        line = f"echo {shlex.quote(f'format=raw:0:drive-scsi0={target}')} | {words} {out}"
        commands.append(Command("reference vma extract", line, makes=out))

    def before() -> None:
        make_archives(place)
        images.copied(target, place.dense)

    return Case(
        "restore, dense, onto an existing tmpfs file",
        commands,
        [Bound("at most 1.0 x dd conv=notrunc", OURS, "dd conv=notrunc", 1.0)],
        before=before,
        leaves=[target, place.memory / "configs"],
        warm=[archive, place.dense],
    )


def _restore_new(place: Place) -> Case:
    archive = place.archive(place.dense)
    target, out = place.disk / "restored", place.disk / "peer.raw"
    return Case(
        "restore, dense, to a new file on disk, flushed",
        [
            Command(OURS, vmapipe("restore", "--quiet", archive, target), target),
            Command("dd conv=fdatasync", dd(place.dense, out, "conv=fdatasync"), out),
            *_reference_extract(place, archive),
        ],
        [Bound("at most 1.1 x dd conv=fdatasync", OURS, "dd conv=fdatasync", 1.1)],
        pinned=False,
        before=lambda: make_archives(place),
        warm=[archive, place.dense],
        leaves=[target, out, place.disk / "reference"],
        warm_up=False,
    )


def _reference_extract(place: Place, archive: Path) -> list[Command]:
    if place.reference is None:
        return []
    out = place.disk / "reference"
    words = shlex.join([place.reference, "extract", str(archive), str(out)])
    return [Command("reference vma extract, sync", f"{words} && sync {out}/*", makes=out)]


def _restore_quarter(place: Place) -> Case:
    archive = place.archive(place.quarter)
    target, out = place.disk / "restored", place.disk / "peer.raw"
    words = ["nbdcopy", "--flush", str(place.quarter), str(out)]
    return Case(
        "restore, 25 % data and holes, to a new file on disk, flushed",
        [
            Command(OURS, vmapipe("restore", "--quiet", archive, target), target),
            Command("nbdcopy --flush", words, out, "nbdcopy"),
            *_reference_extract(place, archive),
        ],
        [Bound("at most 2 x nbdcopy of the image", OURS, "nbdcopy --flush", 2.0)],
        pinned=False,
        before=lambda: make_archives(place),
        leaves=[target, out, place.disk / "reference"],
        warm=[archive],
    )


def _restore_from_zstd(place: Place) -> Case:
    archive = place.disk / "text.vma.zst"
    target, out = place.disk / "restored", place.disk / "peer.raw"
    return Case(
        f"restore, {place.small_mib} MiB, from .zst to a new file, flushed",
        [
            Command(OURS, vmapipe("restore", "--quiet", archive, target), target),
            Command(
                "zstd -dc into dd",
                f"zstd -dcq {archive} | {shlex.join(dd_from_pipe(out))}",
                out,
                "zstd",
            ),
        ],
        # Its frames are independent, so that all cores can decompress.
        [Bound("at most 0.7 x zstd -dc into dd", OURS, "zstd -dc into dd", 0.7)],
        pinned=False,
        before=lambda: make(backup(place.text, archive, "--compress=zstd")),
        leaves=[target, out, archive],
        warm=[archive],
    )


def _zstd(place: Place) -> Case:
    out = place.disk / "text.zst"
    return Case(
        f"backup, zstd, {place.small_mib} MiB that compress to a half",
        [
            Command(
                OURS,
                backup(place.text, place.disk / "text.vma.zst", "--compress=zstd"),
                place.disk / "text.vma.zst",
            ),
            Command(
                "zstd -T2",
                ["zstd", "-q", "-3", "-T2", str(place.text), "-o", str(out)],
                out,
                "zstd",
            ),
            Command(
                "zstd -T2, then sync of its file",
                f"zstd -q -3 -T2 {shlex.quote(str(place.text))} -o {shlex.quote(str(out))} && "
                f"sync {shlex.quote(str(out))}",
                out,
                "zstd",
            ),
        ],
        [Bound("at most 1.1 x zstd -T2", OURS, "zstd -T2", 1.1)],
        # The bound is for two cores; on one, both are the library's time.
        pinned=False,
        leaves=[out, place.disk / "text.vma.zst"],
        warm=[place.text],
    )

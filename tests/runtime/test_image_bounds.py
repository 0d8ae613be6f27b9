# SPDX-License-Identifier: Apache-2.0
"""Images whose files are shorter than their tables say, as qemu-img makes and reads them."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machine import LIMIT_S, Need
from vmapipe.runtime.image_bounds import Truncated, lost

MIB = 1 << 20
FORMATS = [
    "qcow2",
    "qcow2 -o compat=0.10",
    "qcow2 -o cluster_size=512",
    "qcow2 -o extended_l2=on",
    "qed",
    "vdi",
    "vmdk",
    "parallels",
]


def look(image_format: str, data: bytes, snapshot: str = "") -> Truncated | None:
    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    return lost(image_format, read, len(data), snapshot=snapshot)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a byte that is zero."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(random.Random(5).randbytes(3 * MIB).replace(b"\0", b"x"))
    return path


@pytest.mark.parametrize("image_format", FORMATS)
def test_what_a_shortened_file_has_lost_is_exactly_what_qemu_reads_as_zeroes(
    tmp_path: Path, disk: Path, need: Need, image_format: str
) -> None:
    (qemu_img,) = need("qemu-img")
    image, out = tmp_path / "image", tmp_path / "out.raw"
    name, *options = image_format.split()

    def convert(*words: str | Path) -> int:
        return subprocess.run(
            [qemu_img, "convert", *words], capture_output=True, timeout=LIMIT_S, check=False
        ).returncode

    assert convert("-O", name, *options, disk, image) == 0
    whole, wanted = image.read_bytes(), disk.read_bytes()
    assert look(name, whole) is None
    silent = 0
    for cut in (1000, 70_000, 2 * MIB + 77, len(whole) - 3000):
        image.write_bytes(whole[:-cut])
        found = look(name, whole[:-cut])
        if convert("-f", name, "-O", "raw", image, out):
            continue  # QEMU says so itself
        read = out.read_bytes()[: len(wanted)]
        zeroes = read.count(0)
        assert found is not None
        assert found.length == zeroes
        if zeroes:
            assert found.offset == read.index(0)
        silent += 1
    assert silent, "QEMU reads shortened files of this format"


def test_a_compressed_image_is_whole_and_one_that_lacks_clusters_is_not(
    tmp_path: Path, need: Need
) -> None:
    (qemu_img,) = need("qemu-img")
    raw, image = tmp_path / "disk.raw", tmp_path / "image"
    raw.write_bytes(random.Random(6).randbytes(1500).hex().encode() * 1500)
    subprocess.run([qemu_img, "convert", "-c", "-O", "qcow2", raw, image], check=True)
    whole = image.read_bytes()
    assert len(whole) % 65536, "the file ends where the last compressed cluster does"
    assert look("qcow2", whole) is None
    found = look("qcow2", whole[: len(whole) // 2])
    assert found is not None
    assert not found.is_cut


def test_room_for_zeroes_behind_the_end_is_no_loss_and_tables_behind_it_are(
    tmp_path: Path, need: Need
) -> None:
    qemu_img, qemu_io = need("qemu-img", "qemu-io")
    image = tmp_path / "image"
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, "2G"], check=True)
    # The second table of clusters comes behind the first one's data.
    for words in ("write 0 128k", "write 1G 128k", "write -z 1G 128k"):
        subprocess.run([qemu_io, "-f", "qcow2", "-c", words, image], check=True, timeout=LIMIT_S)
    whole = image.read_bytes()
    assert look("qcow2", whole) is None
    # Zeroes need no bytes; only what lies before the second table's two clusters counts.
    assert look("qcow2", whole[: -2 * 65536]) is None
    found = look("qcow2", whole[: -3 * 65536])
    assert found == Truncated(1 << 30, 512 * MIB, is_cut=False)


def test_an_internal_snapshot_has_tables_of_its_own(tmp_path: Path, disk: Path, need: Need) -> None:
    qemu_img, qemu_io = need("qemu-img", "qemu-io")
    image = tmp_path / "image"
    subprocess.run([qemu_img, "convert", "-O", "qcow2", disk, image], check=True)
    subprocess.run([qemu_img, "snapshot", "-c", "monday", image], check=True)
    end = image.stat().st_size
    subprocess.run(
        [qemu_io, "-f", "qcow2", "-c", "write -P 7 0 2M", image], check=True, timeout=LIMIT_S
    )
    cut = image.read_bytes()[: end + 65536]
    assert look("qcow2", cut, "monday") is None
    assert look("qcow2", cut) is not None
    assert look("qcow2", cut, "tuesday") is None, "QEMU says that there is none"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_nonsense_is_survived(data: st.DataObject) -> None:
    name, magic, at = data.draw(
        st.sampled_from(
            [
                ("qcow2", b"QFI\xfb\0\0\0\3", 0),
                ("qed", b"QED\0", 0),
                ("vdi", b"\x7f\x10\xda\xbe", 0x40),
                ("vmdk", b"KDMV", 0),
                ("parallels", b"WithouFreSpacExt", 0),
            ]
        )
    )
    # Words of the size of their numbers, most of them small: wild ones are QEMU's to refuse.
    words = st.sampled_from([0, 1, 2, 9, 16, 64, 512, 4096, 1 << 16, (1 << 32) - 1])
    fields = data.draw(st.lists(words, min_size=0, max_size=120))
    raw = bytearray(struct.pack(f"{'>' if name == 'qcow2' else '<'}{len(fields)}I", *fields))
    raw[at : at + len(magic)] = magic
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 2000:
            raise InterruptedError

    try:
        lost(
            name, lambda offset, length: bytes(raw[offset : offset + length]), len(raw), check=check
        )
    except InterruptedError:
        pass  # it can be given up

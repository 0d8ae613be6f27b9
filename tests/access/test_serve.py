# SPDX-License-Identifier: Apache-2.0
"""Served archives, seen by clients: the same bytes as a restore's, or an error with its place."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.access.serving import Served, serving
from tests.archives import archive, extents_of, in_order, manifest
from tests.control.coordinator.test_events import events
from tests.machine import Need, bad, good, make_disk
from tests.protocol.nbd.client import Client
from vmapipe.protocol.nbd.constants import NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES

# Random data, zeroes, a hole, single blocks, and a last cluster that is cut.
PATTERN = "AApA00hhhhpAAA0pphA" * 9 + "A"
TAIL_BYTES = 12345


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "a.raw", PATTERN, TAIL_BYTES)


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_what_it_tells_is_what_the_schema_describes(tmp_path: Path, disk: Path, sock: Path) -> None:
    with serving(sock, stored(tmp_path, disk, "--no-manifest")) as served:
        pass
    assert list(events(served.said.encode())) == ["notice", "exported"]


def stored(tmp_path: Path, disk: Path, *words: str, name: str = "vm.vma") -> Path:
    path = tmp_path / name
    good("backup", "--quiet", "--disk", f"a={disk}", *words, str(path))
    return path


@pytest.mark.parametrize("words", [(), ("--compress", "zstd")], ids=["plain", "zstd"])
def test_what_is_read_is_what_a_restore_would_write(
    tmp_path: Path, disk: Path, sock: Path, words: tuple[str, ...]
) -> None:
    path, content = stored(tmp_path, disk, *words), disk.read_bytes()
    chance = random.Random(3)
    with serving(sock, path), Client(sock, "a") as client:
        assert client.read_all(1 << 20) == content
        for _ in range(300):
            start = chance.randrange(len(content))
            length = min(len(content) - start, chance.choice([1, 511, 4096, 5000, 70000, 300000]))
            assert client.read(start, length) == content[start : start + length]


@pytest.mark.parametrize("words", [(), ("--compress", "zstd")], ids=["plain", "zstd"])
def test_clients_that_we_did_not_write_see_the_disk(
    need: Need, tmp_path: Path, disk: Path, sock: Path, words: tuple[str, ...]
) -> None:
    img, io, copy, info = need("qemu-img", "qemu-io", "nbdcopy", "nbdinfo")
    path = stored(tmp_path, disk, *words)
    with serving(sock, path) as served:
        uri = served.uri("a")
        subprocess.run([img, "compare", "-f", "raw", "-F", "raw", str(disk), uri], check=True)
        subprocess.run([copy, uri, str(tmp_path / "copy.raw")], check=True)
        told = json.loads(subprocess.check_output([info, "--json", uri]))["exports"][0]
        assert (told["export-size"], told["is_read_only"]) == (disk.stat().st_size, True)
        totals = json.loads(subprocess.check_output([info, "--map", "--totals", "--json", uri]))
        holes = sum(entry["size"] for entry in totals if entry["type"] == 3)
        assert holes == sum(map(PATTERN.count, "0h")) * 65536 + PATTERN.count("p") * 15 * 4096
        refused = subprocess.run([io, "-f", "raw", "-c", "write 0 4k", uri], capture_output=True)
        assert refused.returncode != 0
    assert (tmp_path / "copy.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(("level", "is_slow"), [(3, False), (9, True)])
def test_of_slow_random_reads_it_tells_why_and_the_way_out(
    tmp_path: Path, sock: Path, level: int, is_slow: bool
) -> None:
    disk = make_disk(tmp_path / "a.raw", "A" * 58 * 3)
    path = stored(tmp_path, disk, "--compress", f"zstd:{level}")
    with serving(sock, path) as served:
        pass
    assert ("random reads are slow" in served.said) == is_slow
    assert ("`vmapipe repack --compress zstd`" in served.said) == is_slow


def test_damage_is_an_io_error_with_its_place_and_never_other_data(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    path, content = stored(tmp_path, disk), disk.read_bytes()
    raw = bytearray(path.read_bytes())
    hit = extents_of(bytes(raw))[1]
    raw[hit.offset + 5000] ^= 1
    path.write_bytes(raw)
    damaged = []
    with serving(sock, path) as served, Client(sock, "a") as client:
        for cluster in range(len(PATTERN)):
            start, end = cluster * 65536, min(len(content), cluster * 65536 + 65536)
            try:
                assert client.read(start, end - start) == content[start:end]
            except OSError as error:
                damaged.append(error.errno)
    assert set(damaged) == {errno.EIO}
    assert len(damaged) <= 58
    assert f"the extent at offset {hit.offset} is damaged" in served.said


def test_another_address_than_a_sockets_path_is_refused_with_the_way_out(disk: Path) -> None:
    text = bad("serve", disk, "--listen", "tcp://127.0.0.1:10809", code=2)
    assert "on a Unix socket only" in text


def test_an_archive_that_is_cut_serves_what_there_is(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    path, content = stored(tmp_path, disk), disk.read_bytes()
    cut = extents_of(path.read_bytes())[-1].offset + 700
    os.truncate(path, cut)
    with serving(sock, path) as served, Client(sock, "a") as client:
        assert client.read(0, 65536) == content[:65536]
        with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
            client.read(len(content) - 100, 100)
    assert caught.value.errno == errno.EIO
    assert "ends inside an extent" in served.said


def test_an_archive_without_a_manifest_is_served_and_that_is_said(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    path = stored(tmp_path, disk, "--no-manifest")
    with serving(sock, path) as served, Client(sock, "a") as client:
        assert client.read_all(1 << 20) == disk.read_bytes()
    assert "no manifest" in served.said


def test_clusters_in_any_order_and_several_disks_are_served(tmp_path: Path, sock: Path) -> None:
    chance = random.Random(5)
    disks = {
        "a": make_disk(tmp_path / "1", "AAp0AAhA" * 20).read_bytes(),
        "b": make_disk(tmp_path / "2", "pA0" * 31, 777, seed=2).read_bytes(),
    }
    order = in_order(disks)
    chance.shuffle(order)
    raw = archive(disks, {"qemu-server.conf": b"x"}, order=order)
    path = tmp_path / "vm.vma"
    path.write_bytes(raw)
    (tmp_path / "vm.vma.manifest.json").write_bytes(manifest(raw))
    with serving(sock, path):
        for name, content in disks.items():
            with Client(sock, name) as client:
                assert client.read_all(1 << 20) == content


def test_an_archive_that_is_removed_meanwhile_is_served_on(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    path = stored(tmp_path, disk)
    with serving(sock, path), Client(sock, "a") as client:
        path.unlink()
        assert client.read_all(1 << 20) == disk.read_bytes()


@pytest.mark.parametrize("program", ["gzip", "zstd", "lzop"])
def test_an_archive_that_is_compressed_as_one_piece_is_served_while_it_is_decompressed(
    need: Need, tmp_path: Path, disk: Path, sock: Path, program: str
) -> None:
    (path,) = need(program)
    raw = stored(tmp_path, disk).read_bytes()
    packed = tmp_path / "packed"
    packed.write_bytes(subprocess.run([path, "-c"], input=raw, capture_output=True).stdout)
    cache = tmp_path / "cache"
    cache.mkdir()
    with serving(sock, packed, "--cache", cache), Client(sock, "a") as client:
        assert client.read(0, 70000) == disk.read_bytes()[:70000]
        assert client.read_all(1 << 20) == disk.read_bytes()
        assert not list(cache.iterdir())  # it has no name, so nothing can stay behind


def test_clusters_in_any_order_come_out_of_one_compressed_piece(
    need: Need, tmp_path: Path, sock: Path
) -> None:
    (program,) = need("gzip")
    disks = {"a": make_disk(tmp_path / "1", "AAp0AAhA" * 30).read_bytes()}
    order = in_order(disks)
    random.Random(4).shuffle(order)
    raw = archive(disks, order=order)
    packed = tmp_path / "vm.vma.gz"
    packed.write_bytes(subprocess.run([program, "-c"], input=raw, capture_output=True).stdout)
    with serving(sock, packed), Client(sock, "a") as client:
        assert client.read_all(1 << 20) == disks["a"]


def test_a_compressed_piece_that_is_damaged_or_too_large_is_an_io_error(
    need: Need, tmp_path: Path, disk: Path, sock: Path
) -> None:
    (program,) = need("gzip")
    raw = stored(tmp_path, disk).read_bytes()
    packed = bytearray(subprocess.run([program, "-1c"], input=raw, capture_output=True).stdout)
    path, content = tmp_path / "vm.vma.gz", disk.read_bytes()
    path.write_bytes(packed)
    with serving(sock, path, "--cache-size", "3M") as served, Client(sock, "a") as client:
        assert client.read(0, 65536) == content[:65536]
        with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
            client.read(len(content) - 100, 100)
        assert caught.value.errno == errno.EIO
    assert "--cache-size" in served.said
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    with serving(sock, path), Client(sock, "a") as client:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            client.read_all(1 << 20)
        assert caught.value.errno == errno.EIO


def test_of_a_compressed_piece_that_is_cut_off_is_served_what_came_and_the_rest_is_data(
    tmp_path: Path, need: Need
) -> None:
    """Programs that ask for holes first come to what there is."""
    (info,) = need("nbdinfo")
    disk = make_disk(tmp_path / "disk", "A" * 200)
    good("backup", "--quiet", "--disk", f"a={disk}", tmp_path / "vm.vma")
    packed = gzip.compress((tmp_path / "vm.vma").read_bytes(), 1)
    (tmp_path / "vm.vma.gz").write_bytes(packed[: len(packed) // 2])
    with serving(tmp_path / "s", tmp_path / "vm.vma.gz") as served:
        subprocess.run([info, "--map", served.uri("a")], check=True, stdout=subprocess.DEVNULL)
        with Client(tmp_path / "s", "a") as client:
            assert client.read(0, 65536) == disk.read_bytes()[:65536]
            with pytest.raises(OSError, match="cut off"):
                client.read(199 * 65536, 65536)
    # Called by its name, and once.
    assert f"{tmp_path}/vm.vma.gz is cut off inside its gzip data" in served.said
    assert "fd:" not in served.said


def test_all_archives_of_a_folder_are_served_and_a_damaged_one_is_left_out(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    stored(folder, disk, name="one.vma")
    stored(folder, disk, "--compress", "zstd", name="two.vma.zst")
    (folder / "three.vma").write_bytes(b"not an archive at all" * 1000)
    with serving(sock, "--all", folder) as served:
        for name in ("one.vma/a", "two.vma.zst/a"):
            with Client(sock, name) as client:
                assert client.read_all(1 << 20) == disk.read_bytes()
    assert "left out" in served.said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-"], "cannot be read at any place"),
        (["exec:cat x"], "cannot be read at any place"),
        (["/nowhere/vm.vma"], "No such file"),
        (["{archive}", "--device", "z"], "no device 'z'"),
        ([], "which archive"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, disk: Path, sock: Path, words: list[str], text: str
) -> None:
    path = stored(tmp_path, disk)
    words = [word.replace("{archive}", str(path)) for word in words]
    code = 2 if text in ("cannot be read at any place", "no device 'z'", "which archive") else 1
    assert text in bad("serve", "--listen", sock, *words, code=code)
    assert not sock.exists()


def test_an_index_that_is_kept_is_used_only_for_the_file_that_it_was_made_of(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    path, cache = stored(tmp_path, disk), tmp_path / "cache"
    for _ in range(2):
        with serving_cached(sock, cache, path), Client(sock, "a") as client:
            assert client.read_all(1 << 20) == disk.read_bytes()
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    # The same uuid and name, another content: a copy of the index would point to other bytes.
    raw = archive(
        {"a": make_disk(tmp_path / "b", "A" * 50, seed=9).read_bytes()}, uuid=uuid_of(path)
    )
    path.write_bytes(raw)
    (tmp_path / "vm.vma.manifest.json").write_bytes(manifest(raw))
    with serving_cached(sock, cache, path), Client(sock, "a") as client:
        assert client.read_all(1 << 20) == (tmp_path / "b").read_bytes()
    kept.write_bytes(os.urandom(5000))
    with serving_cached(sock, cache, path), Client(sock, "a") as client:
        assert client.read_all(1 << 20) == (tmp_path / "b").read_bytes()


def uuid_of(path: Path) -> bytes:
    return path.read_bytes()[8:24]


def serving_cached(sock: Path, cache: Path, path: Path) -> AbstractContextManager[Served]:
    return serving(sock, "--index-cache", cache, path, cached=True)


# --- writes, kept in a file ---


def test_writes_are_kept_in_a_file_and_found_again(tmp_path: Path, disk: Path, sock: Path) -> None:
    path, cow = stored(tmp_path, disk), tmp_path / "cow"
    content = bytearray(disk.read_bytes())
    chance = random.Random(11)
    before = path.read_bytes()
    for _ in range(3):
        with serving(sock, path, "--cow", cow), Client(sock, "a") as client:
            assert client.read_all(1 << 20) == content
            for _ in range(120):
                start = chance.randrange(len(content))
                length = min(len(content) - start, chance.choice([1, 100, 4096, 9000, 200000]))
                if chance.random() < 0.5:
                    start -= start % 4096
                    length -= length % 4096 or 0
                if not length:
                    continue
                kind = chance.choice(["write", "write", "zeroes", "trim"])
                if kind == "write":
                    data = chance.randbytes(length)
                    client.write(start, data)
                    content[start : start + length] = data
                elif kind == "zeroes":
                    client.command(NBD_CMD_WRITE_ZEROES, start, length)
                    content[start : start + length] = bytes(length)
                else:
                    client.command(NBD_CMD_TRIM, start, length)
                    # A trim is a hint: whole blocks read as zero, the others are as they were.
                    first, end = -(-start // 4096) * 4096, start + length
                    last = end if end == len(content) else end // 4096 * 4096
                    if last > first:
                        content[first:last] = bytes(last - first)
                assert client.read(start, length) == content[start : start + length]
            assert client.read_all(1 << 20) == content
    assert path.read_bytes() == before
    assert cow.stat().st_blocks * 512 < len(content)


def test_a_file_of_another_disk_is_not_taken_for_writes(
    tmp_path: Path, disk: Path, sock: Path
) -> None:
    path, other = stored(tmp_path, disk), stored(tmp_path, disk, name="other.vma")
    cow = tmp_path / "cow"
    with serving(sock, path, "--cow", cow):
        pass
    said = bad("serve", "--listen", sock, other, "--cow", cow)
    assert "does not hold writes to this device" in said
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 10000)
    bad("serve", "--listen", sock, path, "--cow", precious)
    assert precious.read_bytes() == b"x" * 10000


def test_a_machine_writes_on_what_qemu_made_above_it(
    need: Need, tmp_path: Path, disk: Path, sock: Path
) -> None:
    img, io = need("qemu-img", "qemu-io")
    path, overlay = stored(tmp_path, disk), tmp_path / "over.qcow2"
    with serving(sock, path) as served:
        make = [img, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", served.uri("a")]
        subprocess.run([*make, str(overlay)], check=True)
        subprocess.run([io, "-c", "write -P 7 100k 64k", str(overlay)], check=True)
        subprocess.run([img, "convert", "-O", "raw", str(overlay), str(tmp_path / "o")], check=True)
    content = bytearray(disk.read_bytes())
    content[100 << 10 : 164 << 10] = b"\7" * (64 << 10)
    assert (tmp_path / "o").read_bytes()[: len(content)] == content

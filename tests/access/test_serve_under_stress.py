# SPDX-License-Identifier: Apache-2.0
"""Served archives while something goes wrong: what is read is right, or it is an error; nobody waits."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.access.mounting import need_fuse
from tests.access.serving import serving
from tests.archives import extents_of
from tests.machine import LIMIT_S, Need, eventually, good, make_disk
from tests.protocol.nbd.client import Client
from vmapipe.access.index import decode_index, encode_index
from vmapipe.protocol.nbd.constants import NBD_CMD_READ
from vmapipe.protocol.nbd.session import NbdRequest, encode_request
from vmapipe.restore.archive.digest import extent_digest
from vmapipe.vma.header import parse_header

MIB = 1 << 20
PATTERN = "AApAhhA0A" * 30 + "A"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `disk` and its archives `vm.vma` and `vm.vma.zst`. Read them only."""
    folder = tmp_path_factory.mktemp("stored")
    disk = make_disk(folder / "disk", PATTERN)
    good("backup", "--quiet", "--disk", f"a={disk}", folder / "vm.vma")
    good("backup", "--quiet", "--compress", "zstd", "--disk", f"a={disk}", folder / "vm.vma.zst")
    return folder


def copied(stored: Path, folder: Path, name: str) -> Path:
    for one in (name, f"{name}.manifest.json"):
        (folder / one).write_bytes((stored / one).read_bytes())
    return folder / name


def test_programs_that_read_disks_read_it_as_a_restore_would_have_written_it(
    stored: Path, tmp_path: Path, need: Need
) -> None:
    img, io, copy, fio = need("qemu-img", "qemu-io", "nbdcopy", "fio")
    good("restore", "--quiet", stored / "vm.vma.zst", tmp_path / "out")
    (restored,) = (tmp_path / "out").glob("*.raw")
    with serving(tmp_path / "s", stored / "vm.vma.zst") as served:
        uri = served.uri("a")
        subprocess.run([copy, uri, tmp_path / "copy"], check=True)
        assert (tmp_path / "copy").read_bytes() == restored.read_bytes()
        subprocess.run([img, "compare", "-f", "raw", "-F", "raw", restored, uri], check=True)
        subprocess.run(
            [img, "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "q"], check=True
        )
        subprocess.run(
            [img, "compare", "-f", "raw", "-F", "qcow2", restored, tmp_path / "q"], check=True
        )
        spans = json.loads(subprocess.check_output([img, "map", "-f", "raw", "--output=json", uri]))
        assert sum(span["length"] for span in spans) == restored.stat().st_size
        content = restored.read_bytes()
        for span in spans:
            if span["zero"]:
                start, end = span["start"], span["start"] + span["length"]
                assert not any(content[start:end])
        subprocess.run([io, "-r", "-f", "raw", "-c", "read -P 0 256k 64k", uri], check=True)
        words = ["--name=r", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k"]
        words += ["--iodepth=16", "--time_based", "--runtime=1", "--output-format=json"]
        output = tmp_path / "fio.json"
        subprocess.run([fio, *words, f"--output={output}"], check=True, cwd=tmp_path)
        (job,) = json.loads(output.read_text())["jobs"]
        assert job["error"] == 0
        assert job["read"]["total_ios"] > 0


def test_nbdfuse_makes_a_file_of_it(stored: Path, tmp_path: Path, need: Need) -> None:
    need_fuse()
    nbdfuse, unmount = need("nbdfuse", "fusermount3")
    (tmp_path / "m").mkdir()
    with serving(tmp_path / "s", stored / "vm.vma") as served:
        words = [nbdfuse, "-r", str(tmp_path / "m/disk.raw"), served.uri("a")]
        with subprocess.Popen(words) as process:
            try:
                assert eventually((tmp_path / "m/disk.raw").exists)
                subprocess.run(["cmp", tmp_path / "m/disk.raw", stored / "disk"], check=True)
            finally:
                subprocess.run([unmount, "-u", tmp_path / "m"], check=True)
                process.wait(LIMIT_S)


def test_an_archive_that_is_replaced_meanwhile_is_served_on(stored: Path, tmp_path: Path) -> None:
    path = copied(stored, tmp_path, "vm.vma")
    with serving(tmp_path / "s", path), Client(tmp_path / "s", "a") as client:
        (tmp_path / "other").write_bytes(os.urandom(path.stat().st_size))
        (tmp_path / "other").rename(path)
        assert client.read_all(1 << 20) == (stored / "disk").read_bytes()


@pytest.mark.parametrize("name", ["vm.vma", "vm.vma.zst"])
def test_an_archive_that_is_truncated_or_overwritten_meanwhile_is_an_io_error(
    name: str, stored: Path, tmp_path: Path
) -> None:
    path, content = copied(stored, tmp_path, name), (stored / "disk").read_bytes()
    size = path.stat().st_size
    with serving(tmp_path / "s", path) as served, Client(tmp_path / "s", "a") as client:
        assert client.read(0, 65536) == content[:65536]
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(os.urandom(size // 4))
            file.truncate(size // 4 * 3)
        lost = 0
        for at in range(0, len(content), 65536):
            try:
                assert client.read(at, 65536) == content[at : at + 65536]
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017
                lost += 1
        assert 0 < lost < len(PATTERN)
    assert "is damaged" in served.said
    assert served.said.count("read of 65536 bytes failed: ") == lost


def test_an_archive_that_is_truncated_after_it_was_checked_is_told_of_at_each_read(
    stored: Path, tmp_path: Path
) -> None:
    path = copied(stored, tmp_path, "vm.vma")
    last = len(PATTERN) - 1
    with serving(tmp_path / "s", path) as served, Client(tmp_path / "s", "a") as client:
        client.read(last * 65536, 65536)  # its extent counts as checked from now on
        os.truncate(path, path.stat().st_size - 100_000)
        with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
            client.read(last * 65536, 65536)
    assert caught.value.errno == errno.EIO
    line = f"export 'a', byte {last * 65536}: read of 65536 bytes failed: cannot read device 'a'"
    assert line in served.said
    assert "the archive is shorter than it was" in served.said


def test_a_cache_disk_that_is_full_is_an_io_error_with_its_reason(
    stored: Path, tmp_path: Path, need: Need
) -> None:
    prlimit, gzip = need("prlimit", "gzip")
    packed = tmp_path / "vm.vma.gz"
    plain = (stored / "vm.vma").read_bytes()
    packed.write_bytes(subprocess.run([gzip, "-1c"], input=plain, capture_output=True).stdout)
    # A file that cannot grow any more: what a full disk, a quota and a limit have in common.
    limited = [prlimit, f"--fsize={6 << 20}"]
    content = (stored / "disk").read_bytes()
    with (
        serving(tmp_path / "s", packed, before=limited) as served,
        Client(tmp_path / "s", "a") as client,
    ):
        assert client.read(0, 65536) == content[:65536]
        with pytest.raises(OSError) as caught:  # noqa: PT011  its number is looked at
            client.read(len(content) - 65536, 65536)
        assert caught.value.errno == errno.EIO
    assert "cannot keep what is decompressed" in served.said


def test_a_client_that_never_reads_holds_up_nobody(stored: Path, tmp_path: Path) -> None:
    size = (stored / "disk").stat().st_size
    with serving(tmp_path / "s", stored / "vm.vma.zst"), Client(tmp_path / "s", "a") as deaf:
        deaf.send_raw(
            b"".join(
                encode_request(NbdRequest(0, NBD_CMD_READ, n, n * 65536 % (size - MIB), MIB))
                for n in range(200)
            )
        )
        with Client(tmp_path / "s", "a") as client:
            assert client.read_all(1 << 20) == (stored / "disk").read_bytes()
        deaf.abandon()


def test_of_1000_clients_those_who_work_are_served(stored: Path, tmp_path: Path) -> None:
    content = (stored / "disk").read_bytes()
    with ExitStack() as crowd:
        crowd.enter_context(serving(tmp_path / "s", stored / "vm.vma"))
        worker = crowd.enter_context(Client(tmp_path / "s", "a"))
        assert worker.read(0, 65536) == content[:65536]
        for number in range(1000):
            one = crowd.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(str(tmp_path / "s"))
            if number % 100 == 0:
                assert (
                    worker.read(number * 4096, 4096)
                    == content[number * 4096 : number * 4096 + 4096]
                )
        late: list[Client] = []

        def has_come() -> bool:
            # The crowd fills the queue of connections; a client that blocks would wait in it.
            with suppress(BlockingIOError):
                late.append(crowd.enter_context(Client(tmp_path / "s", "a")))
            return bool(late)

        assert eventually(has_come)
        assert late[0].read(0, 65536) == content[:65536]


def test_an_index_that_is_forged_leads_to_no_other_data(stored: Path, tmp_path: Path) -> None:
    """As the user could have made it, with the file's identity and a digest that is right."""
    path, cache = copied(stored, tmp_path, "vm.vma"), tmp_path / "cache"
    content = (stored / "disk").read_bytes()
    with serving(tmp_path / "s", "--index-cache", cache, path, cached=True):
        pass
    (kept,) = cache.iterdir()
    identity, _, rest = kept.read_bytes().partition(b"\n")
    raw = path.read_bytes()
    header = parse_header(raw[: extents_of(raw)[0].offset])
    index = decode_index(rest[16:], header)
    assert index is not None
    first, second = index.offsets[0], index.offsets[1]
    index.offsets[0], index.offsets[1] = second, first
    index.digests = bytearray()  # as of an archive without a manifest
    body = encode_index(index)
    kept.write_bytes(identity + b"\n" + extent_digest(body) + body)
    wrong = 0
    with (
        serving(tmp_path / "s", "--index-cache", cache, path, cached=True),
        Client(tmp_path / "s", "a") as client,
    ):
        for at in range(0, len(content), 65536):
            try:
                assert client.read(at, 65536) == content[at : at + 65536]
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017
                wrong += 1
    assert wrong

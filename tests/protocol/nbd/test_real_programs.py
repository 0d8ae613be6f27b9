# SPDX-License-Identifier: Apache-2.0
"""Our server against other people's clients, and our client against other people's servers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.machine import Need, listens
from tests.protocol.nbd.client import Client, explore
from tests.protocol.nbd.disk import ALL_FLAGS, Disk, export_of
from tests.protocol.nbd.server import DiskServer
from vmapipe.protocol.nbd import constants as c
from vmapipe.protocol.nbd.client_handshake import Goal
from vmapipe.protocol.nbd.errors import NbdRefusedError
from vmapipe.protocol.nbd.session import Export

SIZE = (8 << 20) + 512  # not a multiple of anything large
CLUSTER = 64 << 10


def content(seed: int = 7) -> bytes:
    """Half data, half zeroes, by clusters."""
    chance = random.Random(seed)
    clusters = (
        chance.randbytes(CLUSTER) if number % 3 else bytes(CLUSTER)
        for number in range(SIZE // CLUSTER + 1)
    )
    return b"".join(clusters)[:SIZE]


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=[True, False], ids=["structured", "simple"])
def structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# --- our server ---


def test_qemu_img_reads_our_export(need: Need, tmp_path: Path, structured: bool) -> None:
    (qemu_img,) = need("qemu-img")
    disk = Disk(content())
    copy = tmp_path / "copy.raw"
    with DiskServer(tmp_path / "s", disk, [export_of(SIZE)], structured=structured) as server:
        info = json.loads(run(qemu_img, "info", "--output=json", server.uri))
        run(qemu_img, "convert", "-f", "raw", "-O", "raw", server.uri, str(copy))
        extents = json.loads(run(qemu_img, "map", "-f", "raw", "--output=json", server.uri))
    assert info["virtual-size"] == SIZE
    assert copy.read_bytes() == disk.content
    assert any(extent["zero"] for extent in extents) == structured
    asked = {request.type for request in disk.seen}
    assert (c.NBD_CMD_BLOCK_STATUS in asked) == structured
    assert {session.structured for session in server.sessions} == {structured}
    assert server.faults == []


def test_qemu_img_writes_to_our_export(need: Need, tmp_path: Path, structured: bool) -> None:
    (qemu_img,) = need("qemu-img")
    source = tmp_path / "source.raw"
    source.write_bytes(content())
    disk = Disk(b"\xff" * SIZE)
    with DiskServer(tmp_path / "s", disk, [export_of(SIZE)], structured=structured) as server:
        words = ("-n", "-f", "raw", "-O", "raw", str(source), server.uri)
        run(qemu_img, "convert", *words)
    assert disk.content == content()
    asked = {request.type for request in disk.seen}
    assert {c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_FLUSH} <= asked
    assert server.faults == []


def test_nbdinfo_understands_our_server(need: Need, tmp_path: Path, structured: bool) -> None:
    (nbdinfo,) = need("nbdinfo")
    exports = [export_of(SIZE), Export("other", 512, c.NBD_FLAG_READ_ONLY, "a small one")]
    disk = Disk(content())
    with DiskServer(tmp_path / "s", disk, exports, structured=structured) as server:
        info = json.loads(run(nbdinfo, "--json", server.uri))
        listed = json.loads(run(nbdinfo, "--json", "--list", server.uri))
    (export,) = info["exports"]
    assert info["structured"] == structured
    assert export["export-name"] == "disk"
    assert export["description"] == "a disk of a test"
    assert export["export-size"] == SIZE
    for able in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn"):
        assert export[f"can_{able}"] is True
    assert export["can_df"] == structured
    assert export["is_read_only"] is False
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 << 20]
    assert ("base:allocation" in export.get("contexts", [])) == structured
    names = {entry["export-name"]: entry["is_read_only"] for entry in listed["exports"]}
    assert names == {"disk": False, "other": True}
    assert server.faults == []


def test_nbdinfo_maps_our_export(need: Need, tmp_path: Path) -> None:
    (nbdinfo,) = need("nbdinfo")
    disk = Disk(content())
    with DiskServer(tmp_path / "s", disk, [export_of(SIZE)]) as server:
        extents = json.loads(run(nbdinfo, "--json", "--map", server.uri))
    at = 0
    for extent in extents:
        assert extent["offset"] == at
        part = disk.content[at : at + extent["length"]]
        assert (extent["type"] == 3) == (not any(part))
        at += extent["length"]
    assert at == SIZE


def test_nbdinfo_is_told_that_an_export_is_unknown(need: Need, tmp_path: Path) -> None:
    (nbdinfo,) = need("nbdinfo")
    disk = Disk(b"")
    with DiskServer(tmp_path / "s", disk, [export_of(0), Export("other", 0)]) as server:
        uri = server.uri.replace("///disk", "///none")
        done = subprocess.run([nbdinfo, uri], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "No such file or directory for export: none" in done.stderr
    assert server.faults == []


def test_nbdcopy_copies_both_ways_over_several_connections(need: Need, tmp_path: Path) -> None:
    (nbdcopy,) = need("nbdcopy")
    disk, copy = Disk(content()), Disk(b"\xff" * SIZE)
    with (
        DiskServer(tmp_path / "s", disk, [export_of(SIZE)]) as source,
        DiskServer(tmp_path / "t", copy, [export_of(SIZE)]) as target,
    ):
        run(nbdcopy, "--connections=2", "--requests=8", "--flush", source.uri, target.uri)
    assert copy.content == disk.content
    assert len(source.sessions) == len(target.sessions) == 2
    asked = {request.type for request in copy.seen}
    assert {c.NBD_CMD_WRITE, c.NBD_CMD_WRITE_ZEROES, c.NBD_CMD_FLUSH} <= asked
    assert source.faults == target.faults == []


def test_qemu_io_sends_every_kind_of_write(need: Need, tmp_path: Path) -> None:
    (qemu_io,) = need("qemu-io")
    disk = Disk(b"\xff" * SIZE)
    commands = [
        "write -P 17 -f 100 5000",
        "write -z -u 65536 65536",
        "write -z 262144 65536",
        "discard 524288 65536",
        "flush",
        "read -P 17 100 5000",
    ]
    words = [word for command in commands for word in ("-c", command)]
    with DiskServer(tmp_path / "s", disk, [export_of(SIZE)]) as server:
        run(qemu_io, "-f", "raw", *words, server.uri)
    seen = {(request.type, request.flags) for request in disk.seen}
    fua, no_hole = c.NBD_CMD_FLAG_FUA, c.NBD_CMD_FLAG_NO_HOLE
    assert (c.NBD_CMD_WRITE, fua) in seen
    assert {(c.NBD_CMD_WRITE_ZEROES, fua), (c.NBD_CMD_WRITE_ZEROES, fua | no_hole)} <= seen
    assert (c.NBD_CMD_TRIM, 0) in seen
    assert disk.content[100:5100] == b"\x11" * 5000
    assert server.faults == []


def test_a_read_only_export_is_not_written_to(need: Need, tmp_path: Path) -> None:
    (qemu_io,) = need("qemu-io")
    disk = Disk(content())
    export = export_of(SIZE, flags=ALL_FLAGS | c.NBD_FLAG_READ_ONLY)
    with DiskServer(tmp_path / "s", disk, [export]) as server:
        words = [qemu_io, "-f", "raw", "-c", "write 0 512", server.uri]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert disk.content == content()


# --- our client ---


@contextmanager
def serving(socket_path: Path, *words: str) -> Iterator[None]:
    """A server program in the foreground, from the moment that its socket is there."""
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not listens(socket_path):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"{words[0]} does not serve: {process.communicate()[1]}")
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def exercise(path: Path, name: str, before: bytes, *, structured: bool) -> None:
    """Everything that a client can do, on an export that may be written to."""
    model = bytearray(before)
    with Client(path, name, structured=structured) as client:
        flags = client.session.flags
        assert client.session.structured == structured
        assert client.session.export.size_bytes == len(model)
        assert client.read_all(CLUSTER) == model
        assert client.read_all(1 << 20) == model
        data = os.urandom(100_000 // 512 * 512)
        client.write(512, data, c.NBD_CMD_FLAG_FUA if flags & c.NBD_FLAG_SEND_FUA else 0)
        model[512 : 512 + len(data)] = data
        if flags & c.NBD_FLAG_SEND_WRITE_ZEROES:
            client.command(c.NBD_CMD_WRITE_ZEROES, 1024, 4096)
            client.command(c.NBD_CMD_WRITE_ZEROES, CLUSTER, CLUSTER, c.NBD_CMD_FLAG_NO_HOLE)
            model[1024 : 1024 + 4096] = bytes(4096)
            model[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
        if flags & c.NBD_FLAG_SEND_CACHE:
            client.command(c.NBD_CMD_CACHE, 0, CLUSTER)
        if flags & c.NBD_FLAG_SEND_FLUSH:
            client.command(c.NBD_CMD_FLUSH)
        if flags & c.NBD_FLAG_SEND_DF:
            assert client.read(0, CLUSTER, c.NBD_CMD_FLAG_DF) == model[:CLUSTER]
        if flags & c.NBD_FLAG_SEND_TRIM:
            client.command(c.NBD_CMD_TRIM, 4 * CLUSTER, CLUSTER)
            model[4 * CLUSTER : 5 * CLUSTER] = client.read(4 * CLUSTER, CLUSTER)
        assert client.read_all(300_032) == model
        if client.session.meta_contexts:
            check_extents(client, model)


def check_extents(client: Client, model: bytearray) -> None:
    extents = client.extents()
    assert any(flags & c.NBD_STATE_ZERO for _, _, flags in extents)
    for offset, length, flags in extents:
        if flags & c.NBD_STATE_ZERO:
            assert not any(model[offset : offset + length])
    assert sum(length for _, length, _ in extents) == len(model)


def test_our_client_uses_qemu_nbd(need: Need, tmp_path: Path, structured: bool) -> None:
    (qemu_nbd,) = need("qemu-nbd")
    image, path = tmp_path / "disk.raw", tmp_path / "s"
    image.write_bytes(content())
    words = (qemu_nbd, "-t", "-f", "raw", "-k", str(path), "-x", "disk", "-D", "words", str(image))
    with serving(path, *words):
        exercise(path, "disk", content(), structured=structured)
        assert explore(path, "", Goal.LIST).listed == [("disk", "words")]
        found = explore(path, "disk", Goal.INFORMATION)
        assert found.export is not None
        assert found.export.description == "words"
        assert found.offered_contexts == ("base:allocation",)
        with pytest.raises(NbdRefusedError, match="NBD_REP_ERR_UNKNOWN"):
            Client(path, "other")


def test_our_client_uses_nbdkit_memory(need: Need, tmp_path: Path, structured: bool) -> None:
    (nbdkit,) = need("nbdkit")
    path = tmp_path / "s"
    with serving(path, nbdkit, "-f", "-U", str(path), "memory", str(SIZE)):
        exercise(path, "", bytes(SIZE), structured=structured)


def test_our_client_uses_nbdkit_file(need: Need, tmp_path: Path, structured: bool) -> None:
    (nbdkit,) = need("nbdkit")
    image, path = tmp_path / "disk.raw", tmp_path / "s"
    image.write_bytes(content())
    with serving(path, nbdkit, "-f", "-U", str(path), "file", str(image)):
        exercise(path, "", content(), structured=structured)


def test_our_client_falls_back_to_an_export_name(need: Need, tmp_path: Path) -> None:
    """nbdkit can be told to speak the plain newstyle only."""
    (nbdkit,) = need("nbdkit")
    path = tmp_path / "s"
    words = (nbdkit, "-f", "-U", str(path), "--mask-handshake=0", "memory", str(SIZE))
    with serving(path, *words):
        exercise(path, "", bytes(SIZE), structured=False)


def test_our_client_hears_the_errors_of_a_server(need: Need, tmp_path: Path) -> None:
    (nbdkit,) = need("nbdkit")
    path = tmp_path / "s"
    words = (nbdkit, "-f", "-U", str(path), "--filter=error", "memory", str(SIZE))
    with (
        serving(path, *words, "error-pread-rate=100%", "error-pread=EIO"),
        Client(path) as client,
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            client.read(0, 512)
        assert caught.value.errno == c.NBD_EIO
        client.write(0, b"x" * 512)


def test_our_client_hears_that_tls_is_required(need: Need, tmp_path: Path) -> None:
    (nbdkit,) = need("nbdkit")
    path = tmp_path / "s"
    keys = tmp_path / "keys.psk"
    keys.write_text("qemu:" + "00" * 32 + "\n")
    words = (nbdkit, "-f", "-U", str(path), "--tls=require", f"--tls-psk={keys}")
    with (
        serving(path, *words, "memory", str(SIZE)),
        pytest.raises(NbdRefusedError, match="NBD_REP_ERR_TLS_REQD"),
    ):
        Client(path)

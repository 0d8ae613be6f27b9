# SPDX-License-Identifier: Apache-2.0
"""`vmapipe copy` between folders: all that belongs to an archive, checked, resumed, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.archives import archive, manifest
from tests.machine import bad, good, run
from vmapipe.crypt.keys import X25519Identity, encode_bech32
from vmapipe.places.archives import find_archives
from vmapipe.places.copying import copy_archive
from vmapipe.places.place import ArchiveFolder
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Damaged, Failure

RAW = archive({"a": random.Random(1).randbytes(40 * 65536)}, {"c": b"1"})
NAME = "vm-2026-01-01.vma"
BESIDE = {".manifest.json": manifest(RAW), ".notes": b"note", ".protected": b"", ".digests": b"d"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    keep(folder, NAME)
    return folder


@pytest.fixture
def cancel() -> Iterator[Cancel]:
    with contextlib.closing(Cancel()) as one:
        yield one


def keep(folder: Path, name: str, raw: bytes = RAW) -> None:
    (folder / name).write_bytes(raw)
    for ending, data in BESIDE.items():
        (folder / (name + ending)).write_bytes(data)
    (folder / f"{name.removesuffix('.vma')}.log").write_bytes(b"log")


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(source: Path, target: Path, cancel: Cancel) -> int:
    """Copy all in this process; return how many bytes were there."""
    kept = 0
    with (
        contextlib.closing(ArchiveFolder(str(source))) as one,
        contextlib.closing(ArchiveFolder(str(target))) as other,
    ):
        for each in find_archives(one):
            kept += copy_archive(one, each, other, lambda count: None, cancel).kept_bytes
    return kept


def test_all_that_belongs_to_an_archive_goes_along_and_what_is_there_is_passed_over(
    source: Path, out: Path
) -> None:
    keep(source, "old-2020-01-01.vma")
    (source / f"{NAME}.verified.json").write_bytes(b"{}")
    expected = {
        name: data for name, data in held(source).items() if not name.endswith(".verified.json")
    }
    os.utime(source / NAME, (1_700_000_000, 1_700_000_000))
    assert "copied 2 archives" in good("copy", source, out).decode()
    assert held(out) == expected
    assert (out / NAME).stat().st_mtime == 1_700_000_000
    assert "2 were there" in good("copy", source, out).decode()
    (out / NAME).write_bytes(RAW[:-1])
    assert "is not the same archive" in bad_line(run("copy", source, out))
    good("copy", "--missing", source, out)
    newer = out / "newer"
    newer.mkdir()
    good("copy", "--newer-than=1000w", "--only=vm", source / NAME, newer)
    good("copy", "--newer-than=1h", source, newer)
    assert [name for name in held(newer) if name.endswith(".vma")] == [NAME]


def bad_line(done: subprocess.CompletedProcess[bytes]) -> str:
    assert done.returncode == 1
    first, last = done.stderr.decode().splitlines()
    assert last.startswith("vmapipe copy: something is wrong with")
    return first


def test_compressed_and_moved_it_is_read_back_first(source: Path, out: Path) -> None:
    os.unlink(source / f"{NAME}.protected")
    good("copy", "--move", "--compress=zstd:1", "--quiet", source / NAME, out)
    there = [f"{NAME}.zst", f"{NAME}.zst.manifest.json", f"{NAME}.zst.notes"]
    assert sorted(held(out)) == ["vm-2026-01-01.log", *there]
    assert held(out)[f"{NAME}.zst.notes"] == BESIDE[".notes"]
    assert held(source) == {}
    good("verify", "--require-manifest", "--quiet", out / f"{NAME}.zst")
    (source / "in").mkdir()
    good("copy", "--move", "--quiet", out, source / "in")
    assert held(out) == {}
    assert sorted(held(source / "in")) == ["vm-2026-01-01.log", *there]
    # What is protected stays where it is; its copy is there all the same.
    (source / "in" / f"{NAME}.zst.protected").touch()
    assert "protected" in run("copy", "--move", "--quiet", source / "in", out).stderr.decode()
    assert f"{NAME}.zst" in held(source / "in")


@pytest.mark.parametrize("kind", ["flipped", "cut", "longer", "other manifest", "no manifest line"])
def test_what_is_not_as_its_manifest_says_gets_no_name(
    kind: str, source: Path, out: Path, cancel: Cancel
) -> None:
    raw = bytearray(RAW)
    raw[70000] ^= kind == "flipped"
    raw = raw[:-1] if kind == "cut" else raw + b"x" * (kind == "longer")
    (source / NAME).write_bytes(raw)
    if kind == "other manifest":
        other = archive({"a": random.Random(2).randbytes(40 * 65536)})
        (source / f"{NAME}.manifest.json").write_bytes(manifest(other))
    if kind == "no manifest line":
        (source / f"{NAME}.manifest.json").write_bytes(manifest(RAW)[:-3])
    with pytest.raises(Damaged):
        copied(source, out, cancel)
    assert held(out) == {}
    done = run("copy", "--move", source, out)
    assert done.returncode == 4
    assert NAME in held(source)


def test_what_was_left_is_compared_and_gone_on_with(
    source: Path, out: Path, cancel: Cancel
) -> None:
    partial = out / f"{NAME}.partial"
    for left, kept in (
        (RAW[:100_000], 100_000),
        (b"x" * 9, 0),
        (RAW + b"more", 0),
        (RAW, len(RAW)),
    ):
        partial.write_bytes(left)
        partial.chmod(0o600)
        assert copied(source, out, cancel) == kept
        assert (out / NAME).read_bytes() == RAW
        assert not partial.exists()
        os.unlink(out / NAME)
    # Others can read it, or it has another name: a leftover as any other.
    partial.write_bytes(RAW[:100])
    partial.chmod(0o644)
    assert copied(source, out, cancel) == 0
    os.unlink(out / NAME)
    partial.write_bytes(RAW[:100])
    partial.chmod(0o600)
    os.link(partial, out / "second")
    assert copied(source, out, cancel) == 0
    assert (out / "second").read_bytes() == RAW[:100]


_POINTS = ("fsync", "link", "unlink", "replace", "writev", "open", "close", "utime", "ftruncate")


def _killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that is killed before its system call of that number; False: it got through."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*words: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words, **more)

        return wrapped

    try:
        for name in _POINTS:
            setattr(os, name, counted(getattr(os, name)))
        work()
    finally:
        os._exit(0)


def test_killed_at_any_point_it_leaves_no_half_archive_under_a_name(
    source: Path, out: Path, cancel: Cancel
) -> None:
    number = 1
    while _killed_at(number, lambda: copied(source, out, cancel)):
        found = held(out)
        if NAME in found:
            assert {**found, f"{NAME}.partial": b""} == {**held(source), f"{NAME}.partial": b""}
            number += 10_000  # it was through, but for its end
        if number % 3 == 0:
            for path in out.iterdir():
                path.unlink()
        number += 1
    assert number > 30
    if NAME not in held(out):
        copied(source, out, cancel)
    assert {**held(out), f"{NAME}.partial": b""} == {**held(source), f"{NAME}.partial": b""}


def test_a_target_that_fills_up_is_told_and_gone_on_with_when_there_is_room(
    source: Path, out: Path
) -> None:
    limit = 1 << 20

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run("copy", source, out, preexec_fn=small)
    assert done.returncode == 1
    assert "cannot write" in done.stderr.decode()
    assert sorted(held(out)) == [f"{NAME}.partial"]
    assert "were there" in good("copy", source, out).decode()
    assert held(out) == held(source)


def test_a_source_that_changes_is_refused_without_a_manifest_too(
    source: Path, out: Path, cancel: Cancel
) -> None:
    os.unlink(source / f"{NAME}.manifest.json")

    def change(count: int) -> None:
        os.utime(source / NAME, ns=(count, count))

    with (
        contextlib.closing(ArchiveFolder(str(source))) as one,
        contextlib.closing(ArchiveFolder(str(out))) as other,
    ):
        (each,) = find_archives(one)
        with pytest.raises(Failure, match="changed or replaced"):
            copy_archive(one, each, other, change, cancel)
    assert held(out) == {}
    assert "it has no manifest" in good("copy", source, out).decode()


def test_each_mistake_is_told_in_one_line(source: Path, out: Path) -> None:
    assert "nobody reads archives from a service" in bad("copy", "tcp://h:1", out, code=2)
    assert "vmapipe backup --archiver" in bad("copy", source, "tcp://h:1", code=2)
    assert "neither a folder" in bad("copy", source, source / "no", code=2)
    assert "no archive of that name" in bad("copy", source / "no.vma", out)


def test_what_is_encrypted_on_the_way_tells_nothing_beside_it_and_is_opened_only_when_that_is_said(
    source: Path, out: Path, tmp_path: Path
) -> None:
    secret = bytes(range(32))
    key = tmp_path / "key"
    key.write_text(encode_bech32("age-secret-key-", secret).upper())
    key.chmod(0o600)
    to = ("--encrypt-to", X25519Identity(secret).recipient.text)
    # A wrong one is told although nothing would be encrypted: there is nothing to copy.
    assert "age1x" in bad(
        "copy", "--encrypt-to", "age1x", "--newer-than", "1h", source, out, code=2
    )
    assert "would lose it" in bad_line(run("copy", "--move", "--identity", key, *to, source, out))
    assert held(out) == {}
    assert f"{NAME}.notes stays behind" in good("copy", *to, source, out).decode()
    assert sorted(held(out)) == [f"{NAME}.age{end}" for end in ("", ".manifest.json", ".protected")]
    words = ("copy", "--identity", key, "--compress", "zstd:1", out, source)
    before = held(source)
    assert "--decrypt stores it in the clear" in bad(*words, code=2)
    assert held(source) == before
    os.unlink(source / NAME)
    good("copy", "--identity", key, "--decrypt", out, source)
    assert (source / NAME).read_bytes()[:4] == RAW[:4]

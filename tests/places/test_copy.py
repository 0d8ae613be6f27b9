# SPDX-License-Identifier: Apache-2.0
"""`vmapipe copy` between folders: all that belongs to an archive, checked, resumed, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.archives import archive, manifest
from tests.conftest import CopyHere
from tests.machine import bad, good, run
from vmapipe.control.cli import copy as command
from vmapipe.crypt.keys import X25519Identity, encode_bech32
from vmapipe.places import copying
from vmapipe.places.archives import find_archives
from vmapipe.places.copying import copy_archive
from vmapipe.places.place import ArchiveFolder
from vmapipe.places.reading import source_state
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
    source: Path, out: Path, copy_here: CopyHere
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
    assert "2 were there" in copy_here(source, out)
    (out / NAME).write_bytes(RAW[:-1])
    assert "is not the same archive" in bad_line(copy_here(source, out, code=1))
    copy_here("--missing", source, out)
    newer = out / "newer"
    newer.mkdir()
    copy_here("--newer-than=1000w", "--only=vm", source / NAME, newer)
    copy_here("--newer-than=1h", source, newer)
    assert [name for name in held(newer) if name.endswith(".vma")] == [NAME]


def bad_line(said: str) -> str:
    first, last = said.splitlines()
    assert last.startswith("vmapipe copy: something is wrong with")
    return first


def test_compressed_and_moved_it_is_read_back_first(
    source: Path, out: Path, copy_here: CopyHere
) -> None:
    os.unlink(source / f"{NAME}.protected")
    copy_here("--move", "--compress=zstd:1", "--quiet", source / NAME, out)
    there = [f"{NAME}.zst", f"{NAME}.zst.manifest.json", f"{NAME}.zst.notes"]
    assert sorted(held(out)) == ["vm-2026-01-01.log", *there]
    assert held(out)[f"{NAME}.zst.notes"] == BESIDE[".notes"]
    assert held(source) == {}
    good("verify", "--require-manifest", "--quiet", out / f"{NAME}.zst")
    (source / "in").mkdir()
    copy_here("--move", "--quiet", out, source / "in")
    assert held(out) == {}
    assert sorted(held(source / "in")) == ["vm-2026-01-01.log", *there]
    # What is protected stays where it is; its copy is there all the same.
    (source / "in" / f"{NAME}.zst.protected").touch()
    assert "protected" in copy_here("--move", "--quiet", source / "in", out, code=1)
    assert f"{NAME}.zst" in held(source / "in")


@pytest.mark.parametrize("kind", ["flipped", "cut", "longer", "other manifest", "no manifest line"])
def test_what_is_not_as_its_manifest_says_gets_no_name(
    kind: str, source: Path, out: Path, cancel: Cancel, copy_here: CopyHere
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
    copy_here("--move", source, out, code=4)
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


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_random_moments_it_goes_on_and_is_whole(
    kills: int, source: Path, out: Path, cancel: Cancel
) -> None:
    chance = random.Random(kills)
    began = time.monotonic()
    copied(source, out, cancel)
    usual_s = time.monotonic() - began
    for path in out.iterdir():
        path.unlink()
    for _ in range(kills):
        pid = os.fork()
        if not pid:
            try:
                copied(source, out, cancel)
            finally:
                os._exit(0)
        # No wait for anything: any moment is right.
        time.sleep(chance.uniform(0, usual_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = held(out)
        if NAME in found:
            assert {**found, f"{NAME}.partial": b""} == {**held(source), f"{NAME}.partial": b""}
            for path in out.iterdir():
                path.unlink()
    copied(source, out, cancel)
    assert held(out) == held(source)


def test_a_manifest_that_is_exchanged_meanwhile_arrives_beside_nothing(
    source: Path, out: Path, cancel: Cancel
) -> None:
    other = archive({"a": random.Random(2).randbytes(40 * 65536)})

    def exchange(count: int) -> None:
        (source / f"{NAME}.manifest.json").write_bytes(manifest(other))

    with (
        contextlib.closing(ArchiveFolder(str(source))) as one,
        contextlib.closing(ArchiveFolder(str(out))) as target,
    ):
        (each,) = find_archives(one)
        with pytest.raises(Failure, match="changed or replaced"):
            copy_archive(one, each, target, exchange, cancel)
    assert set(held(out)) <= {f"{NAME}.partial"}


def test_without_a_manifest_it_is_as_long_as_its_place_says(
    source: Path, out: Path, cancel: Cancel
) -> None:
    os.unlink(source / f"{NAME}.manifest.json")
    with (
        contextlib.closing(ArchiveFolder(str(source))) as one,
        contextlib.closing(ArchiveFolder(str(out))) as other,
    ):
        (each,) = find_archives(one)
        lie = each._replace(file=each.file._replace(size_bytes=len(RAW) + 1))
        with pytest.raises(Failure, match="changed or replaced"):
            copy_archive(one, lie, other, lambda count: None, cancel)
    assert held(out) == {}


@pytest.mark.parametrize("more", [[], ["--compress=zstd:1"]])
def test_what_takes_the_name_of_a_moved_archive_meanwhile_stays(
    more: list[str],
    source: Path,
    out: Path,
    copy_here: CopyHere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.unlink(source / f"{NAME}.protected")
    real = source_state
    calls = 0

    def changing(path: str) -> tuple[object, ...]:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.utime(source / NAME, ns=(1, 1))
        return real(path)

    monkeypatch.setattr(command, "source_state", changing)
    said = copy_here("--move", *more, "--quiet", source, out, code=1)
    assert "after it was copied: it stays" in said
    assert NAME in held(source)


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
    assert "nobody reads archives from one" in bad("copy", "tcp://h:1", out, code=2)
    assert "here name a file" in bad("backup", "--disk", source / NAME, "tcp://h:1/vm.vma", code=2)
    assert "the archive's name there" in bad("repack", source / NAME, "tcp://h:1", code=2)
    assert "neither a folder" in bad("copy", source, source / "no", code=2)
    assert "no archive of that name" in bad("copy", source / "no.vma", out)


def test_what_is_encrypted_on_the_way_tells_nothing_beside_it_and_is_opened_only_when_that_is_said(
    source: Path, out: Path, tmp_path: Path, copy_here: CopyHere
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
    assert "would lose it" in bad_line(
        copy_here("--move", "--identity", key, *to, source, out, code=1)
    )
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


def test_of_two_copies_at_the_same_time_the_quicker_one_keeps_its_manifest(
    source: Path, out: Path, cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one has put its own manifest there, and takes it back only where no archive would be without it."""
    expected_of, quicker = copying.expected_of, [True]

    def at_the_end(place: ArchiveFolder, *rest: Any) -> Any:
        if place.name == str(out) and quicker:
            quicker.clear()
            (out / NAME).write_bytes(RAW)  # as the other copy has made it
        return expected_of(place, *rest)

    monkeypatch.setattr(copying, "expected_of", at_the_end)
    with pytest.raises(Failure, match="exists"):
        copied(source, out, cancel)
    assert held(out)[NAME] == RAW
    assert held(out)[f"{NAME}.manifest.json"] == manifest(RAW)


def test_a_manifest_that_is_a_link_is_not_left_out(source: Path, out: Path) -> None:
    elsewhere = source.parent / "elsewhere.json"
    (source / f"{NAME}.manifest.json").rename(elsewhere)
    (source / f"{NAME}.manifest.json").symlink_to(elsewhere)
    assert "is a link or no file" in bad_line(run("copy", source, out).stderr.decode())
    assert held(out) == {}


def test_a_log_of_two_archives_goes_with_the_last_of_them(source: Path, out: Path) -> None:
    keep(source, f"{NAME}.zst")
    for mark in source.glob("*.protected"):
        mark.unlink()
    (source / "vm-2026-01-01.log").write_bytes(b"of both")
    good("copy", "--move", source / NAME, out)
    assert (source / "vm-2026-01-01.log").read_bytes() == b"of both"
    assert not (out / "vm-2026-01-01.log").exists()
    good("copy", "--move", source / f"{NAME}.zst", out)
    assert not (source / "vm-2026-01-01.log").exists()

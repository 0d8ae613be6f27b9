# SPDX-License-Identifier: Apache-2.0
"""Archives through ssh, both ways, in every form that a shell or a parent has for a pipe."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.machine import (
    LIMIT_S,
    VMAPIPE,
    Need,
    bad,
    good,
    make_disk,
    sha256,
)
from tests.pipes.conftest import Far

# Incompressible, more than ssh and all pipes together hold: 24 MiB.
PATTERN = "A" * 384 + "h0p"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("disk") / "sda.raw", PATTERN, 70_001 - 65536)


@pytest.fixture(scope="module")
def stored(far: Far, disk: Path) -> Path:
    """An archive that lies at the far end, with its manifest."""
    good("backup", "--quiet", "--disk", f"sda={disk}", far.folder / "stored.vma")
    return far.folder / "stored.vma"


@pytest.fixture
def there(far: Far) -> Iterator[Path]:
    path = far.folder / "vm.vma"
    yield path
    path.unlink(missing_ok=True)


def vmapipe(*words: str | Path) -> str:
    return shlex.join([*VMAPIPE, *map(str, words)])


def shell(need: Need, line: str) -> subprocess.CompletedProcess[bytes]:
    """A line as a user types it into bash, where a failure anywhere in a pipe counts."""
    (bash,) = need("bash")
    return subprocess.run(
        [bash, "-o", "pipefail", "-c", line], capture_output=True, timeout=LIMIT_S, check=False
    )


def well(done: subprocess.CompletedProcess[bytes]) -> bytes:
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# --- there ---


def test_a_shells_pipe_carries_the_archive(far: Far, disk: Path, there: Path, need: Need) -> None:
    backup = vmapipe("backup", "--quiet", "--disk", f"sda={disk}", "-")
    well(shell(need, f"{backup} | {far.command('cat > vm.vma')}"))
    good("verify", "--quiet", there)


def test_a_command_carries_the_archive_and_another_one_its_manifest(
    far: Far, disk: Path, there: Path
) -> None:
    manifest = f"exec:{far.command('cat > vm.vma.manifest.json')}"
    archive = f"exec:{far.command('cat > vm.vma')}"
    good("backup", "--quiet", "--disk", f"sda={disk}", "--manifest", manifest, archive)
    good("verify", "--quiet", "--require-manifest", there)
    (far.folder / "vm.vma.manifest.json").unlink()


def test_a_descriptor_of_a_parent_carries_the_archive(far: Far, disk: Path, there: Path) -> None:
    theirs, ours = os.pipe()
    with subprocess.Popen(["/bin/sh", "-c", far.command("cat > vm.vma")], stdin=theirs) as ssh:
        os.close(theirs)
        good("backup", "--quiet", "--disk", f"sda={disk}", f"fd:{ours}", pass_fds=[ours])
        os.close(ours)
        assert ssh.wait(LIMIT_S) == 0
    good("verify", "--quiet", there)


def test_a_fifo_carries_the_archive(far: Far, disk: Path, there: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    line = f"{far.command('cat > vm.vma')} < {shlex.quote(str(fifo))}"
    with subprocess.Popen(["/bin/sh", "-c", line]) as ssh:
        good("backup", "--quiet", "--disk", f"sda={disk}", fifo)
        assert ssh.wait(LIMIT_S) == 0
    good("verify", "--quiet", there)


def test_process_substitution_carries_archive_and_manifest(
    far: Far, disk: Path, there: Path, need: Need
) -> None:
    backup = vmapipe("backup", "--quiet", "--disk", f"sda={disk}")
    manifest = far.command("cat > vm.vma.manifest.json")
    # bash does not wait for what stands in >(…): the marks say that both have ended.
    line = (
        f"{backup} --manifest >({manifest}; echo manifest) >({far.command('cat > vm.vma')}; "
        f"echo archive) | sort"
    )
    assert well(shell(need, line)) == b"archive\nmanifest\n"
    good("verify", "--quiet", "--require-manifest", there)
    (far.folder / "vm.vma.manifest.json").unlink()


# --- and back ---


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "zstd"])
def test_a_shells_pipe_brings_it_back(
    far: Far, stored: Path, disk: Path, need: Need, tmp_path: Path, packed: bool
) -> None:
    (zstd,) = need("zstd")
    cat = far.command(f"{zstd} -qc1 stored.vma" if packed else "cat stored.vma")
    well(shell(need, f"{cat} | {vmapipe('restore', '--quiet', '-', tmp_path / 'out')}"))
    assert sha256(tmp_path / "out" / "disk-sda.raw") == sha256(disk)
    well(shell(need, f"{cat} | {vmapipe('verify', '--quiet', '-')}"))


def test_the_header_alone_may_be_read_from_a_pipe_and_from_a_command(
    far: Far, stored: Path, need: Need
) -> None:
    cat = far.command("cat stored.vma")
    assert b"sda" in shell(need, f"{cat} | {vmapipe('list', '-')}").stdout
    # A command that is no longer listened to has not failed.
    assert b"sda" in good("list", f"exec:{cat}")


def test_a_command_and_process_substitution_bring_it_back(
    far: Far, stored: Path, disk: Path, need: Need, tmp_path: Path
) -> None:
    cat, manifest = far.command("cat stored.vma"), far.command("cat stored.vma.manifest.json")
    more = ("--quiet", "--manifest", f"exec:{manifest}")
    good("restore", *more, f"exec:{cat}", tmp_path / "command")
    assert sha256(tmp_path / "command" / "disk-sda.raw") == sha256(disk)
    restore = f"{vmapipe('restore', '--quiet')} --manifest <({manifest}) <({cat})"
    well(shell(need, f"{restore} {shlex.quote(str(tmp_path / 'shell'))}"))
    assert sha256(tmp_path / "shell" / "disk-sda.raw") == sha256(disk)


# --- failures of the far end ---


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("head -c 100000 >/dev/null; exit 7", "ended with exit status 7 after"),
        ("cat >/dev/full", "ended with exit status 1 "),
        ("cat >/dev/null; exit 3", "ended with exit status 3"),
        ("no-such-program", "ended with exit status 127 "),
        # sshd's process for this connection, as when the other host dies: ssh's own status.
        ("head -c 100000 >/dev/null; kill -9 $PPID", "ended with exit status 255"),
    ],
)
def test_a_far_end_that_fails_fails_the_backup_with_its_status(
    far: Far, disk: Path, command: str, words: str
) -> None:
    text = bad("backup", "--disk", f"sda={disk}", f"exec:{far.command(command)} 2>/dev/null")
    assert words in text


def test_a_far_end_that_dies_ends_a_shells_pipe_too(far: Far, disk: Path, need: Need) -> None:
    backup = vmapipe("backup", "--quiet", "--disk", f"sda={disk}", "-")
    done = shell(need, f"{backup} | {far.command('head -c 100000 >/dev/null')}")
    assert done.returncode == 1
    assert b"whoever read the archive has closed it, after" in done.stderr


def test_a_stop_leaves_nothing_running_at_the_far_end_and_no_name_of_an_archive(
    far: Far, disk: Path, there: Path
) -> None:
    hold = far.folder / "hold"
    os.mkfifo(hold)
    # It takes little, and then waits for us: the backup cannot end.
    archive = f"exec:{far.command('head -c 100000 > vm.part; cat hold; cat > /dev/null')}"
    line = f"{vmapipe('backup', '--disk', f'sda={disk}', archive)} && touch {there}"
    shell_process = subprocess.Popen(["/bin/sh", "-c", line], stderr=subprocess.DEVNULL)
    with shell_process, hold.open("wb"):
        # The far end is there, and so is the backup.
        (backup,) = psutil.Process(shell_process.pid).children()
        backup.terminate()
        assert shell_process.wait(LIMIT_S) == 143
    _, alive = psutil.wait_procs(far.sshd.children(recursive=True), timeout=LIMIT_S)
    assert alive == []
    assert (far.folder / "vm.part").stat().st_size <= 100_000
    assert not there.exists()
    hold.unlink()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("head -c 5000000 stored.vma; exit 5", "ended with exit status 5"),
        ("head -c 5000000 stored.vma; kill -9 $PPID", "ended with exit status 255"),
        ("cat no-such-archive", "ended with exit status 1"),
        # The status says that all is well, and the archive that it is not.
        ("head -c 5000000 stored.vma", "the archive ends inside an extent"),
    ],
)
@pytest.mark.parametrize("verb", ["restore", "verify"])
def test_a_stream_that_is_cut_is_a_failure_with_the_far_ends_status(
    far: Far, stored: Path, tmp_path: Path, verb: str, command: str, words: str
) -> None:
    more = [tmp_path / "out"] if verb == "restore" else []
    cut_only = words.startswith("the archive")
    code = 4 if verb == "verify" and cut_only else 1
    text = bad(verb, "--quiet", f"exec:{far.command(command)} 2>/dev/null", *more, code=code)
    assert (verb == "verify" and cut_only) or words in text
    assert not (tmp_path / "out").exists()


def test_a_stream_that_is_cut_between_two_extents_is_a_failure_too(
    far: Far, stored: Path, tmp_path: Path
) -> None:
    from vmapipe.restore.archive.reader import FoundExtent, open_archive
    from vmapipe.restore.archive.survey import survey
    from vmapipe.runtime.cancel import Cancel

    cancel = Cancel()
    with open_archive(str(stored), cancel) as archive:
        found = [find for find in survey(archive, cancel.check) if isinstance(find, FoundExtent)]
        third = found[2].extent.offset
    cancel.close()
    cut = f"exec:{far.command(f'head -c {third} stored.vma')}"
    text = bad("restore", "--quiet", cut, tmp_path / "out")
    assert "missing" in text
    assert not (tmp_path / "out").exists()


def test_a_host_that_cannot_be_reached_is_said_with_sshs_status(
    far: Far, disk: Path, tmp_path: Path
) -> None:
    nowhere = "exec:ssh -o BatchMode=yes -o ConnectTimeout=5 -p 1 127.0.0.1 cat 2>/dev/null"
    assert "exit status 255" in bad("backup", "--disk", f"sda={disk}", nowhere)
    assert "exit status 255" in bad("restore", "--quiet", nowhere, tmp_path / "out")

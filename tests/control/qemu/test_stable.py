# SPDX-License-Identifier: Apache-2.0
"""A stable archive of a machine in use is that of its disk at rest, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.archiver.service.serving import serving as at_a_service
from tests.control.qemu.hammer import Hammer
from tests.control.qemu.storage_daemon import storage_daemon
from tests.machine import bad, end_of, good, make_disk, next_event, started
from tests.producer.guard.serving import serving as monitoring
from vmapipe.vma.header import HEADER_BYTES


def _body(archive: Path) -> bytes:
    """All that does not say when it was made."""
    raw = archive.read_bytes()
    return raw[8:24] + raw[HEADER_BYTES:]


def test_the_order_of_a_guests_writes_does_not_show_in_a_stable_archive(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "a.raw", "ApAAh0" * 40)
    shutil.copy(disk, tmp_path / "same.raw")
    rest, live, other = (tmp_path / f"{name}.vma" for name in ("rest", "live", "other"))
    good("backup", "--quiet", "--stable", "--disk", f"a={tmp_path / 'same.raw'}", rest)
    with storage_daemon(tmp_path, a=disk) as daemon:
        words = ("backup", "--json", "--qmp", daemon.qmp, "--disk", "a", "--speed", "10M")
        for option, archive in (("--stable", live), ("--no-manifest", other)):
            with started(*words, option, archive) as process:
                # All that is written from here on is of a later instant.
                next_event(process, "instant")
                with Hammer(daemon.path, {"a": disk.stat().st_size}, pause_s=0.002) as guest:
                    guest.wait_for(20)
                    assert end_of(process)[0] == 0
            if archive == live:
                # The second one is of what the guest has made of it.
                assert _body(live) == _body(rest)
    assert _body(other) != _body(rest)
    good("verify", live)


def test_a_stable_archive_is_the_same_from_a_monitor_an_export_and_at_a_service(
    tmp_path: Path,
) -> None:
    disk = make_disk(tmp_path / "a.raw", "ApAAh0" * 40)
    rest = tmp_path / "rest.vma"
    good("backup", "--quiet", "--stable", "--disk", f"a={disk}", rest)
    body = _body(rest)
    words = ("backup", "--quiet", "--stable")
    with monitoring(tmp_path, a=disk) as served, at_a_service(tmp_path / "store") as service:
        good(*words, "--monitor", served.monitor, tmp_path / "monitor.vma")
        good(*words, "--nbd", f"a={served.uri('a')}", tmp_path / "export.vma")
        good(*words, "--monitor", served.monitor, *service.words, "served.vma")
        good(*words, "--nbd", f"a={served.uri('a')}", *service.words, "exported.vma")
        service.stop()
    for name in ("monitor", "export", "store/served", "store/exported"):
        assert _body(tmp_path / f"{name}.vma") == body, name


def test_a_stable_archive_has_no_base_and_no_other_time(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "a.raw", "A")
    words = ("backup", "--stable", "--disk", f"a={disk}")
    for more in (("--base", "auto"), ("--reproducible",)):
        assert "--stable" in bad(*words, *more, tmp_path / "x.vma", code=2)
    assert not list(tmp_path.glob("x.vma*"))

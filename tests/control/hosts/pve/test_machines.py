# SPDX-License-Identifier: Apache-2.0
"""`vmapipe backup --pve` and `vmapipe cleanup --pve` as a user runs them, on a simulated node."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.control.hosts.pve.simulated import (
    MIB,
    SimulatedNode,
    archive_of,
    conf,
    content,
    restored,
    running,
    stopped,
)
from tests.control.qemu.played_agent import Agent
from tests.machine import Need, bad, end_of, eventually, good, next_event, run, started
from vmapipe.crypt.keys import X25519Identity, encode_bech32
from vmapipe.vma.header import Config, Header, parse_header, peek_header_bytes


def machines(output: bytes) -> dict[str, Any]:
    events = [json.loads(line) for line in output.splitlines()]
    (found,) = [event for event in events if event["event"] == "machines"]
    return dict(found)


HOOK = """\
#!/bin/sh
echo "$@ | $(grep -hs ^lock CONFIGS/$3.conf)$VMTYPE $HOSTNAME $STOREID $(basename "$DUMPDIR") $(basename "$TARGET" | cut -c1-15) ${LOGFILE:+log}" >>CALLS
"""


def test_machines_come_one_after_the_other_and_one_that_fails_does_not_stop_the_others(
    node: SimulatedNode, tmp_path: Path
) -> None:
    stopped(node, 100)
    node.configure(101, conf(101))  # its volume is gone
    stopped(node, 102, "agent: 1")
    stopped(node, 103, "template: 1")
    (node.pve / "nodes/one/lxc/104.conf").write_text("memory: 64\n")
    (node.pve / "nodes/two/qemu-server/105.conf").write_text("memory: 64\n")
    (node.pve / "user.cfg").write_text("pool:prod::100,101,102,103,104,105:local:\n")
    hook = tmp_path / "hook"
    hook.write_text(
        HOOK.replace("CALLS", str(tmp_path / "calls")).replace("CONFIGS", str(node.configs))
    )
    hook.chmod(0o755)
    words = node.words(
        "--pve",
        "prod",
        "--json",
        "--hook",
        hook,
        "--protected",
        "--notes",
        r"{{guestname}}\n{{vmid}} {{node}}",
    )
    done = run(*words, "local")
    assert done.returncode == 1
    assert "vmapipe backup: 1 of 3 not backed up: VM 101: " in done.stderr.decode()
    assert "vm-101-disk-0.raw: the volume is not there" in done.stderr.decode()
    told = machines(done.stdout)
    assert told["stored"] == [100, 102]
    assert [one["vmid"] for one in told["failed"]] == [101]
    assert [one["vmid"] for one in told["left_out"]] == [103, 104, 105]
    for vmid in (100, 102):
        archive = archive_of(node, vmid)
        assert restored(archive, tmp_path / f"out{vmid}") == {"disk-drive-scsi0.raw": content()}
        assert Path(f"{archive}.notes").read_text() == f"vm{vmid}\n{vmid} one\n"
        assert Path(f"{archive}.protected").read_bytes() == b""
        log = archive.with_suffix(".log").read_text()
        for text in (
            f"Starting Backup of VM {vmid} (qemu)",
            "status = stopped",
            "backup mode: stop",
            f"Finished Backup of VM {vmid}",
        ):
            assert text in log
    assert "lock" not in "".join(node.config(vmid) for vmid in (100, 101, 102))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [
        "job-init | qemu  local dump  ",
        "job-start | qemu  local dump  ",
        *_phases(100, "end"),
        *_phases(101, "abort"),
        *_phases(102, "end"),
        "job-end | qemu  local dump  ",
    ]


def _phases(vmid: int, end: str) -> list[str]:
    rest = f"qemu vm{vmid} local dump vzdump-qemu-{vmid}"
    is_locked = "lock: backup" if end == "end" else ""
    return [
        f"backup-start stop {vmid} | lock: backup{rest} ",
        f"backup-{end} stop {vmid} | {is_locked}{rest} ",
        f"log-end stop {vmid} | {rest} log",
    ]


def test_a_machine_that_does_not_run_is_read_from_its_volumes_whatever_holds_them(
    node: SimulatedNode, need: Need, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linked clone; and a thin volume, which is activated for the backup and not after it."""
    (img, io) = need("qemu-img", "qemu-io")
    base = node.image(9, "base-9-disk-0.qcow2", b"")
    clone = node.image(100, "vm-100-disk-0.qcow2", b"")
    subprocess.run([img, "create", "-q", "-f", "qcow2", base, "4M"], check=True)
    subprocess.run(
        [io, "-f", "qcow2", "-c", "write -P 1 0 1M", base], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(
        [
            img,
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "../9/base-9-disk-0.qcow2",
            "-F",
            "qcow2",
            clone,
        ],
        check=True,
    )
    subprocess.run(
        [io, "-f", "qcow2", "-c", "write -P 2 64k 64k", clone],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    node.configure(
        100,
        "bios: ovmf\nefidisk0: local-lvm:vm-100-disk-1,size=4M\nmemory: 64\n"
        "scsi0: local:9/base-9-disk-0.qcow2/100/vm-100-disk-0.qcow2\n",
    )
    lv = node.root / "dev/pve/vm-100-disk-1"
    lv.parent.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/lvchange"
    stored = tmp_path / "lv"
    stored.write_bytes(content())
    tool.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/lvm\ncase $1 in -ay) cp {stored} {lv};; -an) rm {lv};; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    good(*node.words("--pve", "100", "--compress", "zstd"), node.dump)
    assert (tmp_path / "lvm").read_text() == "-ay -K pve/vm-100-disk-1\n-an pve/vm-100-disk-1\n"
    disks = restored(archive_of(node, 100), tmp_path / "out")
    assert disks["disk-drive-efidisk0.raw"] == content()
    assert disks["disk-drive-scsi0.raw"] == b"\1" * 65536 + b"\2" * 65536 + b"\1" * (
        MIB - 131072
    ) + bytes(3 * MIB)


def test_a_machine_at_rest_that_is_in_use_all_the_same_is_refused(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    """Its QEMU runs, and neither its pid file nor its monitor tells: the image's own lock does."""
    with running(node, need, tmp_path, 100):
        (node.root / "var/run/qemu-server/100.pid").rename(tmp_path / "pid")
        node.qmp(100).rename(tmp_path / "qmp")
        text = bad(*node.words("--pve", "100", "--quiet"), node.dump)
        assert "VM 100: " in text
        assert "in use" in text
        (tmp_path / "pid").rename(node.root / "var/run/qemu-server/100.pid")
        text = bad(*node.words("--pve", "100", "--quiet"), node.dump)
        assert "nothing listens at its monitor" in text
    assert list(node.dump.glob("*.vma*")) == []


@pytest.mark.parametrize(
    ("event", "by"), [("machine", "cleanup"), ("instant", "cleanup"), ("instant", "backup")]
)
def test_a_backup_that_is_killed_leaves_a_lock_that_is_found_again(
    node: SimulatedNode, need: Need, tmp_path: Path, event: str, by: str
) -> None:
    with running(node, need, tmp_path, 100) as machine:
        before = node.config(100)
        words = node.words("--pve", "100", "--json", "--speed", "64K")
        with started(*words, node.dump) as process:
            next_event(process, event)
            assert "another vmapipe backup of VM 100 is running" in bad(
                "cleanup", "--pve", "100", "--pve-root", node.root
            )
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert "lock: backup\n" in node.config(100)
        machine.write("scsi0", "write -P 3 0 4M")
        assert eventually(lambda: machine.ours() == [])
        if by == "cleanup":
            said = good("cleanup", "--pve", "100", "--pve-root", node.root)
            assert b"VM 100: removed the lock that a killed backup has left" in said
            assert node.config(100) == before
            said = good("cleanup", "--pve", "100", "--pve-root", node.root)
            assert b"VM 100: no lock of ours is left" in said
        else:
            # Within the same second it would have the killed one's name.
            killed_s = int(time.time())
            assert eventually(lambda: int(time.time()) > killed_s)
            said = good(*node.words("--pve", "100"), node.dump)
            assert b"a backup that was killed has left its lock" in said
        assert node.config(100) == before
        assert machine.is_untouched()


def test_a_backup_that_is_cancelled_unlocks_its_machine(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    stopped(node, 101)
    with running(node, need, tmp_path, 100) as machine:
        before = node.config(100)
        words = node.words("--pve", "100,101", "--json", "--speed", "64K")
        with started(*words, node.dump) as process:
            next_event(process, "instant")
            process.terminate()
            assert next_event(process, "machines")["stored"] == []
            assert end_of(process)[0] == 143
        assert node.config(100) == before
        assert machine.is_untouched()
    assert list(node.dump.glob("*.vma*")) == []


def test_with_a_base_only_what_has_changed_is_sent_over_the_shared_monitor(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with running(node, need, tmp_path, 100) as machine:
        good(*node.words("--pve", "100", "--base", "auto"), node.dump)
        (first,) = node.dump.glob("*.vma")
        machine.write("scsi0", "write -P 9 128k 64k")
        # Another second, another name.
        assert eventually(lambda: time.strftime("%S") != first.stem[-2:])
        said = good(*node.words("--pve", "100", "--base", "auto", "--json"), node.dump)
        (second,) = set(node.dump.glob("*.vma")) - {first}
        said_of_cleanup = good("cleanup", "--pve", "100", "--bitmaps", "--pve-root", node.root)
        assert b"removed vmapipe-" in said_of_cleanup
        assert machine.is_untouched()
    (base,) = [e for e in map(json.loads, said.splitlines()) if e["event"] == "base"]
    assert base["archive"] == str(first)
    assert base["devices"][0]["changed_bytes"] == 65536
    changed = content()[:131072] + b"\x09" * 65536 + content()[196608:]
    assert restored(second, tmp_path / "out") == {"disk-drive-scsi0.raw": changed}


def test_a_machine_without_disks_is_its_configuration(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    """As vzdump's archive of it; whether it runs or not."""
    text = "memory: 64\nscsi0: local:100/vm-100-disk-0.raw,backup=0\n"
    with running(node, need, tmp_path, 100):
        node.configure(100, text)
        node.configure(101, "memory: 64\n")
        good(*node.words("--pve", "100,101"), node.dump)
    stored = good("config", archive_of(node, 100)).decode()
    assert stored == "memory: 64\n#scsi0: local:100/vm-100-disk-0.raw,backup=0\n"
    assert good("config", archive_of(node, 101)) == b"memory: 64\n"


def test_an_encrypted_machine_has_nothing_beside_it_that_tells_of_it_and_comes_back_with_the_key(
    node: SimulatedNode, tmp_path: Path
) -> None:
    stopped(node, 100)
    (node.root / "etc/vzdump.conf").write_text("notes-template: {{guestname}}\n")
    secret, key = bytes(range(32)), tmp_path / "key"
    key.write_text(encode_bech32("age-secret-key-", secret).upper())
    key.chmod(0o600)
    to = ("--encrypt-to", X25519Identity(secret).recipient.text)
    good(*node.words("--pve", "100", *to, "--protected", "--compress", "zstd"), "local")
    names = sorted(path.name for path in node.dump.iterdir())
    archive = node.dump / names[0]
    assert archive.name.endswith(".vma.zst.age")
    assert names[1:] == [f"{archive.name}{end}" for end in (".manifest.json", ".protected")]
    assert b"drive-scsi0" in good("list", "--identity", key, archive)
    good("verify", "--quiet", "--require-manifest", "--identity", key, archive)
    kept = good("config", "--identity", key, archive)
    assert b"memory: " in kept


def test_somebody_elses_lock_fails_the_machine_and_stays(node: SimulatedNode) -> None:
    stopped(node, 100, "lock: migrate")
    stopped(node, 101, "lock: backup")
    before = node.config(100)
    text = bad(*node.words("--pve", "all", "--quiet"), node.dump)
    assert "VM 100 is locked (migrate): wait for the end of what holds it" in text
    assert "VM 101 is locked (backup): another backup of it runs, or was interrupted" in text
    assert node.config(100) == before
    (log,) = node.dump.glob("vzdump-qemu-100-*.log")
    assert "ERROR: Backup of VM 100 failed - VM 100 is locked (migrate)" in log.read_text()


def test_the_guest_is_frozen_for_the_instant_through_the_machines_own_socket(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    agent = Agent(node.root / "var/run/qemu-server/100.qga")
    agent.start()
    try:
        with running(node, need, tmp_path, 100, "agent: enabled=1,type=virtio") as machine:
            machine.ask("cont")
            said = good(*node.words("--pve", "100", "--json"), node.dump)
    finally:
        agent.close()
    assert "guest-fsfreeze-freeze" in agent.commands
    assert agent.commands[-1] == "guest-fsfreeze-thaw"
    assert not agent.is_frozen()
    assert b'"thawed"' in said


def test_an_agent_that_does_not_answer_is_told_and_the_machine_is_backed_up(
    node: SimulatedNode, need: Need, tmp_path: Path
) -> None:
    with running(node, need, tmp_path, 100, "agent: 1") as machine:
        machine.ask("cont")
        said = good(*node.words("--pve", "100"), node.dump)
    assert b"the guest's file systems are not frozen, as its configuration says" in said
    assert archive_of(node, 100).exists()


def test_header_and_configuration_are_those_of_the_reference_tool(
    node: SimulatedNode, golden: Path
) -> None:
    """Of the same machine; with the map lines that vzdump adds, and a uuid and time of its own."""

    def header(path: Path) -> Header:
        with path.open("rb") as file:
            start = file.read(64 << 10)
        return parse_header(start[: peek_header_bytes(start)])

    theirs = header(golden / "g02-two-disks-cfg.vma")
    text, firewall = (config.data for config in theirs.configs)
    node.configure(100, text.decode())
    (node.pve / "firewall/100.fw").write_bytes(firewall)
    for number, device in enumerate(theirs.devices):
        node.image(100, f"vm-100-disk-{number}.raw", bytes(device.size_bytes))
    good(*node.words("--pve", "100"), node.dump)
    ours = header(archive_of(node, 100))
    maps = b"".join(
        b"#qmdump#map:%b:drive-%b:local:raw:\n" % (key, key) for key in (b"scsi0", b"virtio0")
    )
    stored = (Config("qemu-server.conf", text + maps), Config("qemu-server.fw", firewall))
    assert ours == theirs._replace(
        uuid=ours.uuid, ctime_s=ours.ctime_s, configs=stored, header_bytes=ours.header_bytes
    )


def store_in_database(node: SimulatedNode) -> None:
    """As pmxcfs keeps what /etc/pve shows; without its links."""
    place = node.root / "var/lib/pve-cluster/config.db"
    place.parent.mkdir(parents=True)
    inodes = {Path(): 0}
    with contextlib.closing(sqlite3.connect(place)) as database:
        database.execute(
            "CREATE TABLE tree (inode INTEGER PRIMARY KEY, parent INTEGER, version INTEGER, "
            "writer INTEGER, mtime INTEGER, type INTEGER, name TEXT, data BLOB)"
        )
        for source in sorted(node.pve.rglob("*")):
            path = source.relative_to(node.pve)
            if not source.is_symlink():
                inodes[path] = len(inodes)
                data = source.read_bytes() if source.is_file() else None
                row = (inodes[path], inodes[path.parent], 4 if data is None else 8, path.name, data)
                words = "INSERT INTO tree (inode, parent, type, name, data) VALUES (?,?,?,?,?)"
                database.execute(words, row)
        database.commit()


def test_a_dead_nodes_machines_are_found_in_its_database(
    node: SimulatedNode, tmp_path: Path
) -> None:
    """Its disk is mounted somewhere: /etc/pve is empty there, and nothing in it can be locked."""
    stopped(node, 100, "tags: gold")
    (node.pve / "firewall/100.fw").write_text("[OPTIONS]\n")
    store_in_database(node)
    shutil.rmtree(node.pve)
    node.pve.mkdir()
    (node.root / "etc/hostname").write_text("one.example.org\n")
    good("backup", "--pve", "gold", "local", env={**os.environ, "VMAPIPE_PVE_ROOT": str(node.root)})
    archive = archive_of(node, 100)
    assert restored(archive, tmp_path / "out") == {"disk-drive-scsi0.raw": content()}
    assert good("config", archive, "--name", "qemu-server.fw") == b"[OPTIONS]\n"
    assert list(node.pve.iterdir()) == []

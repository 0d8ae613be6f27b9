# SPDX-License-Identifier: Apache-2.0
"""`vmapipe doctor --pve`: a machine of a node, running and at rest."""

from __future__ import annotations

from pathlib import Path

from tests.control.hosts.examined import examined, topics
from tests.control.hosts.pve.simulated import SimulatedNode, scsi
from tests.machine import Need


def test_a_machine_of_proxmox_is_looked_at_running_and_at_rest(
    node: SimulatedNode,
    need: Need,
    tmp_path: Path,
) -> None:
    conf = "name: web\nagent: 1\nscsi0: local:100/a.raw,size=1M\nscsi1: local:100/b.raw,backup=0\n"
    path = node.configure(100, conf)
    disks = [node.image(100, name, bytes(1 << 20)) for name in ("a.raw", "b.raw")]
    words = ("--pve", "100", "--pve-root", node.root)
    assert [d["name"] for d in examined(*words)["disks"]] == ["drive-scsi0"]
    with node.running(need, tmp_path, 100, [*scsi(0, disks[0]), *scsi(1, disks[1])]):
        found = examined(*words)
        assert [d["name"] for d in found["disks"]] == ["drive-scsi0"]
        assert [d["name"] for d in found["left_out"]] == ["drive-scsi1"]
        assert path.read_text() == conf
    path.write_text(f"lock: migrate\n{conf}")
    assert topics(examined(*words, code=1), "problem") == ["lock"]
    path.write_text(conf)
    disks[0].unlink()
    assert topics(examined(*words, code=1), "problem") == ["disks"]
    assert topics(examined("--pve", "999", "--pve-root", node.root, code=1), "problem")

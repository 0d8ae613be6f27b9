# SPDX-License-Identifier: Apache-2.0
"""QEMU's own backup job of one disk, from a command to its end, by as little of a client as can be.

    python own_job.py QMP_SOCKET DEVICE nbd:SOCKET|FILE

It imports nothing of ours: what it takes is what QEMU takes. A file is as large as the disk, and is
flushed at the end.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main(path: str, device: str, target: str) -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        lines = sock.makefile("r")
        lines.readline()

        def ask(name: str, **arguments: object) -> None:
            sock.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
            while "return" not in (answer := json.loads(lines.readline())):
                if "error" in answer:
                    raise SystemExit(f"{name}: {answer['error']}")

        ask("qmp_capabilities")
        kind, _, where = target.partition(":")
        node: dict[str, object] = {"driver": "file", "filename": target}
        if kind == "nbd":
            node = {"driver": "nbd", "server": {"type": "unix", "path": where}}
        ask("blockdev-add", **{"node-name": "own-target", **node})
        job = {"job-id": "own", "device": device, "target": "own-target", "sync": "full"}
        ask("blockdev-backup", **job)
        while (event := json.loads(lines.readline())).get("event") != "BLOCK_JOB_COMPLETED":
            pass
        if "error" in event["data"]:
            raise SystemExit(f"QEMU's job: {event['data']['error']}")
        ask("blockdev-del", **{"node-name": "own-target"})
    if kind != "nbd":
        fd = os.open(target, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

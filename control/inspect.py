# SPDX-License-Identifier: Apache-2.0
"""`vmapipe list`, `vmapipe config` and `vmapipe verify`: look, and write nothing."""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Sequence

from vmapipe.control.render import human_bytes
from vmapipe.control.words import naming
from vmapipe.restore.reading import Archive, open_archive
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.process import run
from vmapipe.vma.header import Config, Header
from vmapipe.vma.names import printable

ARCHIVE_HELP = "a file, - (stdin), a FIFO, exec:COMMAND, fd:N; plain or compressed"
DEFAULT_CONFIG = "qemu-server.conf"


def main_list(argv: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Tell what an archive holds: its devices with their sizes, and its configs.",
        epilog="example:\n  vmapipe list vm.vma.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("archive", metavar="ARCHIVE", help=ARCHIVE_HELP)
    options = parser.parse_args(argv)
    return run(prog, lambda: _list(options))


def main_config(argv: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print a configuration stored in an archive, byte for byte.",
        epilog="example:\n  vmapipe config vm.vma --name qemu-server.fw",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        help=f"which one (default: {DEFAULT_CONFIG}, or the only one there is)",
    )
    parser.add_argument("--json", action="store_true", help="print all of them as a JSON object")
    parser.add_argument("archive", metavar="ARCHIVE", help=ARCHIVE_HELP)
    options = parser.parse_args(argv)
    return run(prog, lambda: _config(options))


def open_by_name(name: str) -> Archive:
    """The archive, or a Failure that names it."""
    cancel = Cancel()
    cancel.on_signals()
    with naming(name):
        return open_archive(name, cancel)


def _list(options: argparse.Namespace) -> None:
    with open_by_name(options.archive) as archive:
        header = archive.header
        if options.json:
            print(json.dumps(listing(header)))
            return
        made = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(header.ctime_s))
        print(f"{options.archive}: VMA archive {uuid.UUID(bytes=header.uuid)}, made {made}")
        for device in header.devices:
            size = human_bytes(device.size_bytes)
            kind = "memory" if device.is_vmstate else "device"
            note = " (an estimate)" if device.is_vmstate else ""
            print(
                f"  {kind} {device.dev_id:3}  {printable(device.name):<24} "
                f"{device.size_bytes:>16} bytes  {size}{note}"
            )
        for config in header.configs:
            print(f"  config      {printable(config.name):<24} {len(config.data):>16} bytes")


def listing(header: Header) -> dict[str, object]:
    """The header as JSON has it; sizes in bytes, time in seconds since 1970."""
    return {
        "uuid": header.uuid.hex(),
        "ctime": header.ctime_s,
        "devices": [
            {
                "dev_id": d.dev_id,
                "name": d.name,
                "bytes": d.size_bytes,
                "kind": "vmstate" if d.is_vmstate else "disk",
            }
            for d in header.devices
        ],
        "configs": [{"name": c.name, "bytes": len(c.data)} for c in header.configs],
    }


def _config(options: argparse.Namespace) -> None:
    with open_by_name(options.archive) as archive:
        configs = archive.header.configs
    if options.json:
        texts = {c.name: c.data.decode("utf-8", "backslashreplace") for c in configs}
        print(json.dumps(texts))
        return
    sys.stdout.buffer.write(find_config(configs, options.name).data)


def find_config(configs: Sequence[Config], name: str | None) -> Config:
    """The config of that name; without one the default's, or the only one. Raises Failure."""
    wanted = name if name is not None else DEFAULT_CONFIG
    found = next((config for config in configs if config.name == wanted), None)
    if found is None and name is None and len(configs) == 1:
        found = configs[0]
    if found is None:
        there = ", ".join(printable(config.name) for config in configs) or "none at all"
        raise Failure(f"the archive has no config {wanted!r}; it has {there}")
    return found

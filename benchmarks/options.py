# SPDX-License-Identifier: Apache-2.0
"""What an option costs, against the same work without it: the manifest, encryption."""

from __future__ import annotations

import shlex
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import OURS, Bound, Case, Command
from benchmarks.place import Place, backup, make, vmapipe


def manifest(place: Place) -> Case:
    out, bare = place.disk / "manifest.vma", place.disk / "bare.vma"
    return Case(
        "backup, dense, to a file on disk, flushed: cost of the manifest",
        [
            Command(OURS, backup(place.dense, out), out),
            Command("vmapipe --no-manifest", backup(place.dense, bare, "--no-manifest"), bare),
        ],
        [Bound("at most 1.15 x without it", OURS, "vmapipe --no-manifest", 1.15)],
        pinned=False,
        warm=[place.dense],
        leaves=[out, bare],
        warm_up=False,
    )


# Its secret half is written down nowhere.
_RECIPIENT = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"


def encryption(place: Place) -> Case:
    """What age itself takes for the same bytes is the third command's CPU time less the second's."""
    plain = shlex.join(map(str, backup(place.small, "-")))
    return Case(
        f"backup, dense, {place.small_mib} MiB, encrypted with age, to nothing",
        [
            Command(OURS, backup(place.small, "/dev/null", "--encrypt-to", _RECIPIENT)),
            Command("vmapipe, plain", backup(place.small, "/dev/null")),
            Command("vmapipe into age", f"{plain} | age -r {_RECIPIENT} > /dev/null", needs="age"),
        ],
        # Encryption may cost 1.3 x age's own; a backup without it costs about as much once more.
        [Bound("at most 1.15 x into age", OURS, "vmapipe into age", 1.15, cpu=True)],
        pinned=False,
        warm=[place.small],
    )


def curve(place: Place) -> Case:
    archiver, client = place.disk / "keys", place.disk / "client-keys"

    def keys() -> None:
        make(vmapipe("keygen", archiver))
        make(vmapipe("keygen", "--client", client))
        shutil.copy(archiver / "server.pub", client / "server.pub")
        shutil.copy(client / "client.pub", archiver / "clients" / "bench.pub")

    return Case(
        f"backup over TCP on the loopback, {place.small_mib} MiB, to nothing",
        [
            Command(OURS, _over_tcp(place, ["--keys", archiver], ["--keys", client])),
            Command("vmapipe, plain TCP", _over_tcp(place, *[["--insecure-plain-tcp"]] * 2)),
        ],
        [Bound("CURVE at least 60 % of plain TCP", OURS, "vmapipe, plain TCP", 1 / 0.6)],
        before=keys,
        leaves=[archiver, client],
        warm=[place.small],
    )


def _over_tcp(place: Place, archiver: Sequence[str | Path], client: Sequence[str | Path]) -> str:
    """Both processes by hand; the slower start of the two is part of both times."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    listen = vmapipe("archiver", "--listen", endpoint, "--expect", "1", "--output", "/dev/null")
    send = vmapipe("producer", "--archiver", endpoint, "--disk", f"d={place.small}")
    words = [shlex.join([*listen, *map(str, archiver)]), shlex.join([*send, *map(str, client)])]
    return f"{words[0]} & {words[1]} && wait $!"

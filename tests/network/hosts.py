# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: network namespaces, with a cable between them that can be pulled."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

ARCHIVER_ADDRESS = "10.99.0.1"


class Hosts:
    """`archiver` and `producer` are the words that make a command run on that host."""

    def __init__(self, ip: str, mark: str) -> None:
        self._ip = ip
        self._names = (f"vmapipe-{mark}-a", f"vmapipe-{mark}-p")
        self._ends = (f"va{mark}", f"vp{mark}")
        self.archiver = (ip, "netns", "exec", self._names[0])
        self.producer = (ip, "netns", "exec", self._names[1])

    def make(self) -> None:
        (a, p), (end_a, end_p) = self._names, self._ends
        self._do("netns", "add", a)
        self._do("netns", "add", p)
        self._do("link", "add", end_a, "netns", a, "type", "veth", "peer", end_p, "netns", p)
        for name, end, address in ((a, end_a, ARCHIVER_ADDRESS), (p, end_p, "10.99.0.2")):
            self._do("-n", name, "address", "add", f"{address}/24", "dev", end)
            self._do("-n", name, "link", "set", end, "up")
            self._do("-n", name, "link", "set", "lo", "up")

    def plug(self, how: str) -> None:
        """`up` or `down`: the archiver's end of the cable."""
        self._do("-n", self._names[0], "link", "set", self._ends[0], how)

    def remove(self) -> None:
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                self._do("netns", "del", name)

    def _do(self, *words: str) -> None:
        subprocess.run([self._ip, *words], check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def two_hosts(need: Callable[..., list[str]]) -> Iterator[Hosts]:
    """Skips the test where namespaces cannot be made: without root, or in a container."""
    (ip,) = need("ip")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    hosts = Hosts(ip, f"{os.getpid() % 1_000_000}")
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield hosts
    finally:
        hosts.remove()

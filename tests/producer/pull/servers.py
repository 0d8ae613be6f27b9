# SPDX-License-Identifier: Apache-2.0
"""Real NBD servers, with and without TLS, that a test reads from."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.machine import eventually, listens


@contextmanager
def served(*words: str | Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on a Unix socket while the block runs."""
    with subprocess.Popen([str(word) for word in words]) as server:
        try:
            assert eventually(lambda: server.poll() is not None or listens(path))
            assert server.poll() is None
            yield server
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served_on(port: int, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on a port of this host while the block runs."""

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen([str(word) for word in words]) as server:
        try:
            assert eventually(lambda: server.poll() is not None or answers())
            assert server.poll() is None
            yield server
        finally:
            server.terminate()


def make_certificates(folder: Path, openssl: str, name: str, *, days: int = 2) -> Path:
    """A folder as libnbd and nbdkit have it, for a server, and a client, called `name`.

    `days`: how long their certificates are valid; -1: they were.
    """
    folder.mkdir()
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True, timeout=60)

    run(
        *("req", "-x509", *key, "-subj", "/CN=test CA"),
        "-keyout",
        "ca-key.pem",
        "-out",
        "ca-cert.pem",
    )
    (folder / "names").write_text(f"subjectAltName=DNS:{name}\n")
    for who in ("server", "client"):
        run(
            *(
                "req",
                *key,
                "-subj",
                f"/CN={name}",
                "-keyout",
                f"{who}-key.pem",
                "-out",
                f"{who}.csr",
            )
        )
        run(
            *("x509", "-req", "-in", f"{who}.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"),
            *(
                "-CAcreateserial",
                "-days",
                str(days),
                "-extfile",
                "names",
                "-out",
                f"{who}-cert.pem",
            ),
        )
    return folder

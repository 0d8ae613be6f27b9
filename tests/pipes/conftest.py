# SPDX-License-Identifier: Apache-2.0
"""A far end: a real sshd on 127.0.0.1, with keys of its own, for all tests of this folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.machine import Need

# It takes a tenth of a second; a loaded machine may take long.
_START_S = 30.0
_POLL_S = 0.02
_TRIES = 3
# Debian's sshd wants it when it runs as root; its service makes it.
_EMPTY_FOLDER = Path("/run/sshd")


class Far:
    """Another host, as far as ssh is concerned. `folder` is there; `word` is the ssh command."""

    def __init__(self, ssh: str, config: Path, folder: Path, sshd: psutil.Process) -> None:
        self.folder = folder
        self.sshd = sshd
        self.word = f"{ssh} -F {shlex.quote(str(config))} far"

    def command(self, command: str) -> str:
        """What a shell here runs, for `command` to run there, in the folder."""
        there = f"cd {shlex.quote(str(self.folder))} && {command}"
        return f"{self.word} {shlex.quote(there)}"


@pytest.fixture(scope="package")
def far(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    sshd, ssh, keygen = need("sshd", "ssh", "ssh-keygen")
    keys = tmp_path_factory.mktemp("keys")
    for name in ("host", "client"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    made = os.getuid() == 0 and not _EMPTY_FOLDER.exists()
    if made:
        _EMPTY_FOLDER.mkdir(mode=0o755)
    try:
        with _sshd(sshd, keys) as (process, port):
            config = _client_config(keys, port)
            yield Far(ssh, config, tmp_path_factory.mktemp("far"), psutil.Process(process.pid))
    finally:
        if made:
            _EMPTY_FOLDER.rmdir()


@contextlib.contextmanager
def _sshd(sshd: str, keys: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    for left in reversed(range(_TRIES)):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
        config = keys / "sshd_config"
        config.write_text(
            f"""\
ListenAddress 127.0.0.1:{port}
HostKey {keys}/host
AuthorizedKeysFile {keys}/client.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""
        )
        log = keys / "sshd.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sshd, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stderr=stderr
            )
        try:
            # Somebody else may have taken the port meanwhile: then another one.
            if _answers(process, port):
                yield process, port
                return
            assert left, log.read_text()
        finally:
            process.terminate()
            process.wait()


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=_START_S) as one:
                return one.recv(4) == b"SSH-"
        except ConnectionError:
            time.sleep(_POLL_S)
    return False


def _client_config(keys: Path, port: int) -> Path:
    host_key = (keys / "host.pub").read_text()
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    config = keys / "config"
    config.write_text(
        f"""\
Host far
  HostName 127.0.0.1
  Port {port}
  User {getpass.getuser()}
  IdentityFile {keys}/client
  IdentitiesOnly yes
  UserKnownHostsFile {keys}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel ERROR
"""
    )
    return config

# SPDX-License-Identifier: Apache-2.0
"""TLS to a real server: certificates, names, keys, and what is refused."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.machine import Need, make_disk
from tests.producer.pull.reading import content
from tests.producer.pull.servers import free_port, make_certificates, served, served_on
from vmapipe.producer.pull.connections import Endpoint
from vmapipe.producer.pull.export import ExportError, open_export
from vmapipe.producer.pull.uri import parse_nbd_uri
from vmapipe.producer.pull_reader import PullReader
from vmapipe.runtime.cancel import Cancel


@contextmanager
def pulled(text: str) -> Iterator[PullReader]:
    uri = parse_nbd_uri(text)
    endpoint = Endpoint("d", uri.shown, functools.partial(open_export, uri))
    with closing(Cancel()) as cancel, closing(PullReader(endpoint, cancel)) as reader:
        yield reader


def refused(text: str, pattern: str) -> None:
    with pytest.raises(ExportError, match=pattern), pulled(text):
        pass


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Path:
    (openssl,) = need("openssl")
    return make_certificates(tmp_path_factory.mktemp("pki") / "d", openssl, "localhost")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("disk") / "disk.raw", "A0hhp" * 12)


def test_a_server_with_a_certificate_is_read_and_everything_else_is_refused(
    pki: Path, disk: Path, need: Need, tmp_path: Path
) -> None:
    nbdkit, openssl = need("nbdkit", "openssl")
    port = free_port()
    words = [nbdkit, "-f", "-r", "-p", str(port), "-i", "127.0.0.1", "--tls=require"]
    words += [f"--tls-certificates={pki}", "--tls-verify-peer", "file", str(disk)]
    ours = f"tls-certificates={pki}"
    with served_on(port, *words):
        with pulled(f"nbds://localhost:{port}/?{ours}") as reader:
            assert content(reader) == disk.read_bytes()
        with pulled(f"nbds://127.0.0.1:{port}/?{ours}&tls-hostname=localhost") as reader:
            assert reader.size_bytes == disk.stat().st_size
        refused(
            f"nbds://127.0.0.1:{port}/?{ours}", "certificate is not accepted: IP address mismatch"
        )
        refused(
            f"nbds://localhost:{port}/",
            "certificate is not accepted: unable to get local issuer|self.signed",
        )
        refused(
            f"nbds://localhost:{port}/?tls-certificates=/none",
            r"cannot use the certificates in /none.*No such file",
        )
        refused(f"nbd://localhost:{port}/", "ERR_TLS_REQD.*; the server wants TLS: use nbds://")
        other = make_certificates(tmp_path / "other", openssl, "localhost")
        refused(f"nbds://localhost:{port}/?tls-certificates={other}", "certificate is not accepted")
        # A client without a certificate that the server takes is sent away, and does not hang.
        (other / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
        refused(f"nbds://localhost:{port}/?tls-certificates={other}", "disk 'd': nbds://localhost")


def test_tls_over_a_unix_socket_and_none_where_the_server_has_none(
    pki: Path, disk: Path, need: Need, short_folder: Path
) -> None:
    (nbdkit,) = need("nbdkit")
    path = short_folder / "s"
    words = [nbdkit, "-f", "-r", "-U", str(path), "--tls=require", f"--tls-certificates={pki}"]
    with served(*words, "file", disk, path=path):
        uri = f"nbds+unix:///?socket={path}&tls-certificates={pki}"
        with pulled(uri) as reader:
            assert content(reader) == disk.read_bytes()
        refused(f"{uri}&tls-hostname=other", "certificate is not accepted: Hostname mismatch")
    plain = short_folder / "t"
    with served(nbdkit, "-f", "-r", "-U", plain, "file", disk, path=plain):
        uri = f"nbds+unix:///?socket={plain}&tls-certificates={pki}"
        refused(uri, "; the server has no TLS: use nbd://")


def test_a_certificate_that_has_expired_is_refused(
    disk: Path, need: Need, tmp_path: Path, short_folder: Path
) -> None:
    nbdkit, openssl = need("nbdkit", "openssl")
    old = make_certificates(tmp_path / "old", openssl, "localhost", days=-1)
    path = short_folder / "s"
    words = [nbdkit, "-f", "-r", "-U", str(path), "--tls=require", f"--tls-certificates={old}"]
    with served(*words, "file", disk, path=path):
        uri = f"nbds+unix:///?socket={path}&tls-certificates={old}"
        refused(uri, "certificate is not accepted: certificate (has expired|is not yet valid)")


def test_a_key_that_both_sides_share_works_or_is_refused_with_the_way_out(
    disk: Path, need: Need, short_folder: Path
) -> None:
    (nbdkit,) = need("nbdkit")
    path, keys = short_folder / "s", short_folder / "keys"
    keys.write_text(f"other:00\nalice:{os.urandom(32).hex()}\n")
    words = [nbdkit, "-f", "-r", "-U", str(path), "--tls=require", f"--tls-psk={keys}"]
    uri = f"nbds+unix://alice@/?socket={path}&tls-psk-file={keys}"
    with served(*words, "file", disk, path=path):
        if sys.version_info >= (3, 13):
            with pulled(uri) as reader:
                assert content(reader) == disk.read_bytes()
            wrong = short_folder / "wrong"
            wrong.write_text(f"alice:{os.urandom(32).hex()}\n")
            refused(uri.replace(str(keys), str(wrong)), "TLS failed")
        else:
            refused(uri, r"needs Python 3\.13, and this is 3\.1\d: use certificates")
        refused(uri.replace("alice@", "bob@"), "it has no line for the user of the URI$")
        keys.write_text("alice:nonsense\n")
        refused(uri, "the key is not hexadecimal$")


def test_openssl_is_loaded_only_where_there_is_tls() -> None:
    """It takes 15 ms of a start, which most backups do without."""
    text = "import sys, vmapipe.producer.pull_feed, vmapipe.producer.image_source; print('ssl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=True)
    assert done.stdout == b"False\n"

# SPDX-License-Identifier: Apache-2.0
"""One store for all tests of this folder, emptied before each; and a proxy with faults."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import Need
from tests.s3.proxy import FaultyProxy, proxy_to
from tests.s3.server import BUCKET, S3Server, environment_for, running


@pytest.fixture(scope="package")
def s3_server(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    # A Python package brings the program, beside the interpreter.
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside) if os.access(beside, os.X_OK) else need("weed")[0]
    folder = tmp_path_factory.mktemp("s3")
    with running(weed, folder) as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The store, empty, with the environment set for it."""
    _use(monkeypatch, s3_server.environment)
    for key in s3_server.objects():
        s3_server.client.delete_object(Bucket=BUCKET, Key=key)
    for upload in s3_server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
        s3_server.client.abort_multipart_upload(
            Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"]
        )
    return s3_server


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The environment leads through it to the store. Each planned fault must happen."""
    with proxy_to(s3.port) as proxy:
        _use(monkeypatch, environment_for(proxy.port))
        yield proxy


def _use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

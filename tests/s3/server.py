# SPDX-License-Identifier: Apache-2.0
"""A real S3 store for the tests: SeaweedFS, all of it in one process, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "backups"
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
# It takes a second; a loaded machine may take many.
_START_S = 60.0
_POLL_S = 0.05
_TRIES = 3
_SERVICES = ("master", "volume", "filer", "s3", "admin")


class S3Server:
    """`environment` is what a process needs to reach it; `client` is botocore's."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.environment = environment_for(port)
        self.client = make_client(port)

    def objects(self) -> dict[str, int]:
        """Keys and sizes of all there is."""
        found = self.client.list_objects_v2(Bucket=BUCKET)
        return {item["Key"]: item["Size"] for item in found.get("Contents", ())}

    def uploads(self) -> list[str]:
        """Keys of the uploads that are neither complete nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET)
        return [upload["Key"] for upload in found.get("Uploads", ())]

    def data(self, key: str) -> bytes:
        with contextlib.closing(self.client.get_object(Bucket=BUCKET, Key=key)["Body"]) as body:
            return bytes(body.read())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def begin_upload(self, key: str) -> str:
        """As a process does that is killed then."""
        begun = self.client.create_multipart_upload(Bucket=BUCKET, Key=key)
        return str(begun["UploadId"])


def environment_for(port: int) -> dict[str, str]:
    """What names a store and its credentials, and keeps this machine's own settings out."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ALLOW_HTTP": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "*",
    }


def make_client(port: int) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    return Session().create_client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(retries={"mode": "standard", "total_max_attempts": 1}, proxies={}),
    )


@contextlib.contextmanager
def running(weed: str, folder: Path) -> Iterator[S3Server]:
    """The store, with an empty bucket; killed at the end: it has nothing to keep."""
    config = folder / "s3.json"
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    config.write_text(
        json.dumps(
            {"identities": [{"name": "tests", "credentials": credentials, "actions": ["Admin"]}]}
        )
    )
    for left in reversed(range(_TRIES)):
        ports = _free_ports(2 * len(_SERVICES) + 1)
        with _started(weed, folder, config, ports) as process:
            server = S3Server(ports[2 * _SERVICES.index("s3")])
            try:
                # Somebody else may have taken a port meanwhile: then others.
                if not _is_ready(server, process):
                    log = (folder / "weed.log").read_text()[-2000:]
                    assert left, f"the store does not start:\n{log}"
                    continue
                yield server
                return
            finally:
                server.client.close()


@contextlib.contextmanager
def _started(
    weed: str, folder: Path, config: Path, ports: list[int]
) -> Iterator[subprocess.Popen[bytes]]:
    words = [f"-s3.port.lance={ports[-1]}", "-s3.port.iceberg=0", "-s3.autoCreateBucket=false"]
    for index, service in enumerate(_SERVICES):
        words.append(f"-{service}.port={ports[2 * index]}")
        words.append(f"-{service}.port.grpc={ports[2 * index + 1]}")
    words += [f"-dir={folder}", f"-s3.config={config}", "-s3.iam=false"]
    words += [f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"]
    words += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]
    words += ["-master.telemetry=false", "-master.heartbeatInterval=100ms"]
    words += ["-volume.max=20", "-master.volumeSizeLimitMB=256"]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            [weed, "-logtostderr=true", "mini", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "HOME": str(folder)},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for service in _SERVICES:
                for port in ports:
                    Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)


def _is_ready(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _START_S
    bucket_is_there = False
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if not bucket_is_there:
                server.client.create_bucket(Bucket=BUCKET)
                bucket_is_there = True
            # The first data makes it find room: what comes later need not wait.
            server.put("first", bytes(100_000))
            server.client.delete_object(Bucket=BUCKET, Key="first")
            return True
        except (BotoCoreError, ClientError):
            time.sleep(_POLL_S)
    return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

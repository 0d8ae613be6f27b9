# SPDX-License-Identifier: Apache-2.0
"""A bucket of archives as one thing, in a real store; and ten thousand of them, in pages."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.archives import archive, manifest
from tests.machine import good, run
from tests.s3.server import S3Server, environment_for
from vmapipe.places.archives import find_archives
from vmapipe.places.place import ArchiveBucket
from vmapipe.runtime.errors import Failure

RAW = archive({"a": bytes(65536) + b"data" * 30000}, {"c": b"1"})


def test_a_bucket_is_listed_verified_and_pruned_as_a_folder_is(s3: S3Server) -> None:
    for day in (1, 2, 3):
        key = f"vms/vm-2026-01-0{day}.vma"
        s3.put(key, RAW[:-1] + b"!" if day == 3 else RAW)
        s3.put(f"{key}.manifest.json", manifest(RAW))
    s3.put("vms/deeper/vm-2026-01-04.vma", RAW)
    s3.put("vms/vm-2026-01-01.vma.protected", b"")
    done = run("verify", "--quiet", "s3://backups/vms")
    assert done.returncode == 4
    assert done.stderr.decode().splitlines()[-1].endswith("something is wrong with 1 of 3 archives")
    listed = [json.loads(line) for line in good("list", "--json", "s3://backups/vms/").splitlines()]
    assert [each["verified"]["ok"] for each in listed] == [True, True, False]
    assert [each["protected"] for each in listed] == [True, False, False]
    assert "1 of 3" in run("verify", "s3://backups/vms", "--older-than=1h").stdout.decode()
    text = good("prune", "--keep-last=1", "--yes", "s3://backups/vms").decode()
    assert [line.split()[0] for line in text.splitlines()] == ["keep", "removed", "keep"]
    left = [key for key in s3.objects() if "-02.vma" in key]
    assert left == []
    assert "vms/deeper/vm-2026-01-04.vma" in s3.objects()


class _Pages(BaseHTTPRequestHandler):
    """Answers a listing: ten thousand archives, each tenth with a manifest, in pages."""

    item = ""

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        first = int(query.get("continuation-token", ["0"])[0])
        items = "".join(
            f"<Contents><Key>vms/vm{n // 100}-2026-01-01-{n // 60 % 24:02}-{n % 60:02}.vma{ending}</Key>"
            f'<LastModified>2026-01-02T00:00:00.000Z</LastModified><ETag>"e"</ETag><Size>{n}</Size>'
            "</Contents>"
            for n in range(first, first + 500)
            for ending in (("",) if n % 10 else ("", ".manifest.json"))
        )
        items = self.item or items
        more = not self.item and first + 500 < 10_000
        token = f"<NextContinuationToken>{first + 500}</NextContinuationToken>" if more else ""
        body = (
            f'<?xml version="1.0"?><ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>'
            f"{token}{items}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in environment_for(server.server_port).items():
        monkeypatch.setenv(name, value)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("pages")
def test_ten_thousand_archives_come_in_pages() -> None:
    with contextlib.closing(ArchiveBucket("s3://backups/vms")) as place:
        found = find_archives(place)
    assert len(found) == 10_000
    assert sum(each.has_manifest for each in found) == 1000
    assert sum(each.file.size_bytes for each in found) == sum(range(10_000))


@pytest.mark.usefixtures("pages")
def test_a_listing_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmapipe.runtime.objectstore._MAX_LISTED_PAGES", 7)
    with (
        contextlib.closing(ArchiveBucket("s3://backups/vms")) as place,
        pytest.raises(Failure, match="more than 7 pages"),
    ):
        find_archives(place)


_TIME = "<LastModified>2026-01-02T00:00:00.000Z</LastModified>"


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize(
    "item",
    [
        f"<Key>vms/vm.vma</Key>{_TIME}",
        f"<Key>vms/vm.vma</Key>{_TIME}<Size>-5</Size>",
        f"<Key>vms/vm.vma</Key>{_TIME}<Size>many</Size>",
        "<Key>vms/vm.vma</Key><Size>5</Size>",
        "<Key>vms/vm.vma</Key><Size>5</Size><LastModified>soon</LastModified>",
        "</Contents><Contents",
    ],
)
def test_a_listing_that_makes_no_sense_is_an_error_in_words(
    item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Pages, "item", f"<Contents>{item}</Contents>")
    with (
        contextlib.closing(ArchiveBucket("s3://backups/vms")) as place,
        pytest.raises(Failure, match="cannot list s3://backups/vms") as failed,
    ):
        find_archives(place)
    assert "\n" not in str(failed.value)


@pytest.mark.usefixtures("pages")
def test_keys_that_nobody_asked_for_are_no_archives(monkeypatch: pytest.MonkeyPatch) -> None:
    item = f"<Contents><Key>other/vm.vma</Key>{_TIME}<Size>5</Size></Contents>"
    monkeypatch.setattr(_Pages, "item", item)
    with contextlib.closing(ArchiveBucket("s3://backups/vms")) as place:
        assert find_archives(place) == []

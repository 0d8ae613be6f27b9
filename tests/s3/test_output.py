# SPDX-License-Identifier: Apache-2.0
"""An object of a store is an output like any other, and appears when it is complete."""

from __future__ import annotations

import functools
import random
import re
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.archiver.outputs.targets import LIMIT_S, in_thread
from tests.archiver.outputs.test_every_output import (  # noqa: F401  they run here, with the target below
    test_a_description_says_where_the_archive_goes,
    test_abandoning_after_the_commit_does_nothing,
    test_abandoning_at_once_and_twice_is_no_error,
    test_after_its_end_an_output_takes_no_more,
    test_an_abandoned_archive_leaves_nothing,
    test_an_empty_archive_can_be_committed,
    test_any_number_of_buffers_goes_in_one_write,
    test_the_buffers_may_be_used_again_when_a_write_returns,
    test_the_bytes_that_have_left_are_counted,
    test_what_is_written_arrives_whole_and_in_order,
)
from tests.machine import eventually
from tests.s3.proxy import FaultyProxy, proxy_to
from tests.s3.server import BUCKET, S3Server
from vmapipe.archiver.outputs import object as object_module
from vmapipe.archiver.outputs.base import ABANDON_WAIT_S, Output, OutputFailure
from vmapipe.archiver.outputs.object import MAX_PARTS, ObjectOutput, part_bytes
from vmapipe.archiver.outputs.open import open_output
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Cancelled, Failure, UsageError

NAME = f"s3://{BUCKET}/folder/vm.vma"
KEY = "folder/vm.vma"
# The least that S3 takes for a part that is not the last.
LEAST = 5 << 20
DATA_BYTES = 2 * LEAST + 12345


@functools.cache
def sent_data() -> bytes:
    return random.Random(5).randbytes(DATA_BYTES)


class ObjectTarget:
    def __init__(self, s3: S3Server) -> None:
        self._s3 = s3

    def open(self, *, asleep: bool = False, cancel: Cancel | None = None) -> Output:
        return open_output(NAME, cancel=cancel)

    def received(self) -> bytes:
        assert self._s3.uploads() == []
        return self._s3.data(KEY)

    def left(self) -> bytes:
        assert self._s3.uploads() == []
        return self._s3.data(KEY) if self._s3.objects() else b""


@pytest.fixture
def target(s3: S3Server) -> ObjectTarget:
    return ObjectTarget(s3)


def small_parts(**more: object) -> ObjectOutput:
    return ObjectOutput(NAME, first_part_bytes=LEAST, **more)  # type: ignore[arg-type]


def test_parts_arrive_whole_and_in_order_and_only_the_commit_shows_the_object(s3: S3Server) -> None:
    events: list[dict[str, object]] = []
    output = small_parts(emit=events.append)
    for at in range(0, DATA_BYTES, 1_000_003):
        output.write([sent_data()[at : at + 1_000_003]])
    assert s3.objects() == {}
    assert s3.uploads() == [KEY]
    output.commit()
    assert s3.data(KEY) == sent_data()
    assert s3.uploads() == []
    assert output.written_bytes == DATA_BYTES
    assert events == [{"event": "upload", "archive": NAME, "upload": output.upload}]
    assert s3.client.head_object(Bucket=BUCKET, Key=KEY)["ETag"].endswith('-3"')


def test_an_archive_that_exists_is_refused_before_anything_is_sent(s3: S3Server) -> None:
    s3.put(KEY, b"the backup of yesterday")
    with pytest.raises(OutputFailure, match="exists; vmapipe does not overwrite archives"):
        open_output(NAME)
    assert s3.data(KEY) == b"the backup of yesterday"


@pytest.mark.parametrize("size", [100, DATA_BYTES], ids=["in one request", "in parts"])
def test_of_two_writers_to_one_name_the_first_to_commit_wins(s3: S3Server, size: int) -> None:
    first, second = small_parts(), small_parts()
    first.write([sent_data()[:size]])
    second.write([bytes(size)])
    first.commit()
    with pytest.raises(OutputFailure, match="exists; vmapipe does not overwrite archives"):
        second.commit()
    second.abandon()
    assert s3.data(KEY) == sent_data()[:size]
    assert s3.uploads() == []


@pytest.mark.parametrize("size", [100, DATA_BYTES], ids=["in one request", "in parts"])
def test_the_store_itself_refuses_to_replace_what_came_in_the_last_moment(
    s3: S3Server, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = small_parts()
    output.write([sent_data()[:size]])
    # The look before the commit sees nothing.
    monkeypatch.setattr(output, "check_free", lambda: s3.put(KEY, b"another's"))
    with pytest.raises(OutputFailure, match="exists; vmapipe does not overwrite archives"):
        output.commit()
    output.abandon()
    assert s3.data(KEY) == b"another's"
    assert s3.uploads() == []


def test_what_may_be_replaced_is_replaced_and_nothing_newer(s3: S3Server) -> None:
    s3.put(KEY, b"stale")
    late = small_parts(replace=True)
    early = small_parts(replace=True)
    early.write([b"early"])
    early.commit()
    late.write([b"late"])
    with pytest.raises(OutputFailure, match="exists"):
        late.commit()
    late.abandon()
    assert s3.data(KEY) == b"early"
    early.remove()
    assert s3.objects() == {}


def test_what_another_made_is_not_removed(s3: S3Server) -> None:
    output = small_parts()
    output.write([b"ours"])
    output.commit()
    s3.put(KEY, b"another's")
    output.remove()
    assert s3.data(KEY) == b"another's"


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("PUT .*partNumber=2", "cut request"),
        ("PUT .*partNumber=2", "lost answer"),
        ("PUT .*partNumber=2", "refused"),
        ("PUT .*partNumber=[12]", "500"),
        ("PUT .*partNumber=3", "503"),
        ("POST .*uploads", "500"),
        ("POST .*uploadId=", "503"),
        ("POST .*uploadId=", "cut request"),
        ("POST .*uploadId=", "lost answer"),
        ("HEAD", "500"),
    ],
)
def test_a_fault_that_passes_is_survived(
    s3: S3Server, proxy: FaultyProxy, where: str, what: str
) -> None:
    proxy.plan(where, what)
    output = small_parts()
    output.write([sent_data()])
    output.commit()
    assert s3.data(KEY) == sent_data()
    assert output.written_bytes == DATA_BYTES


def test_an_answer_that_is_lost_is_asked_for_again_when_all_went_in_one_request(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    proxy.plan("PUT", "lost answer")
    output = small_parts()
    output.write([b"little"])
    output.commit()
    assert s3.data(KEY) == b"little"


@pytest.mark.parametrize(
    ("where", "what", "words"),
    [
        ("PUT .*partNumber=2", "500", ", part 2: 500: .*, 2 times"),
        ("PUT .*partNumber=2", "cut request", ", part 2: .*"),
        ("PUT .*partNumber=1", "refused", ", part 1: .*"),
        ("PUT .*partNumber=2", "wrong etag", "cannot complete .*: InvalidPart: "),
        ("POST .*uploads", "503", "cannot write .*: 503: .*, 2 times"),
        ("POST .*uploadId=", "500", "cannot complete .*: 500: .*, 2 times"),
    ],
)
def test_a_fault_that_stays_fails_with_its_place_and_nothing_is_left(
    s3: S3Server,
    proxy: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    what: str,
    words: str,
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.plan(where, what, times=100)
    output = small_parts()

    def work() -> None:
        output.write([sent_data()])
        output.commit()

    with pytest.raises(OutputFailure, match=words) as caught:
        work()
    assert NAME in str(caught.value)
    output.abandon()
    assert s3.objects() == {}
    assert s3.uploads() == []


def test_what_may_not_be_looked_at_is_an_error_and_not_a_free_name(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OutputFailure, match=rf"cannot look at {NAME}: 403: .*credentials"):
        small_parts()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(OutputFailure, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
        small_parts()


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("PUT .*partNumber=1", "abandon"),
        ("PUT .*partNumber=1", "cancel"),
        ("POST .*uploadId=", "abandon"),
        ("HEAD", "cancel"),
    ],
)
def test_a_store_that_does_not_answer_keeps_nobody_waiting(
    s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, where: str, how: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    # As long as a part that is stuck is waited for before its upload is left to itself.
    monkeypatch.setattr(object_module, "ABANDON_WAIT_S", 0.3)
    cancel = Cancel()
    made: list[ObjectOutput] = []
    stalled = proxy.plan(where, "stall")

    def work() -> None:
        made.append(small_parts(cancel=cancel))
        made[0].write([sent_data()])
        made[0].commit()

    with in_thread(work) as errors:
        assert stalled.fired.wait(LIMIT_S)
        started = time.monotonic()
        if how == "abandon" and made:
            made[0].abandon()
            # Twice what it may take: this machine may be busy.
            assert time.monotonic() - started < 2 * ABANDON_WAIT_S
        else:
            cancel.ask("cancelled by a test")
    assert len(errors) == 1
    assert isinstance(errors[0], Cancelled if cancel.asked else OutputFailure)
    for output in made:
        output.abandon()
    assert s3.objects() == {}
    assert s3.uploads() == []
    cancel.close()


def test_what_is_published_while_it_is_given_up_is_taken_back(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    output = small_parts()
    output.write([sent_data()])
    proxy.plan("POST .*uploadId=", "late answer")
    with in_thread(output.commit) as errors:
        assert eventually(lambda: bool(s3.objects()))
        assert s3.data(KEY) == sent_data()
        with in_thread(output.abandon):
            proxy.released.set()
    assert [type(error) for error in errors] == [OutputFailure]
    assert s3.objects() == {}


def test_uploads_that_were_left_behind_are_aborted_by_the_next_backup_to_that_folder(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("folder/old.vma", "folder/old.vma.zst", "folder/film.mkv", "elsewhere/old.vma"):
        s3.begin_upload(key)
    events: list[dict[str, object]] = []
    small_parts().abandon()
    assert len(s3.uploads()) == 4, "they are young: somebody may be at work"
    monkeypatch.setattr(object_module, "STALE_S", -60.0)
    small_parts(emit=events.append).abandon()
    assert sorted(s3.uploads()) == ["elsewhere/old.vma", "folder/film.mkv"]
    assert sorted(str(event["text"]) for event in events) == [
        "an upload of folder/old.vma that was left behind was aborted",
        "an upload of folder/old.vma.zst that was left behind was aborted",
    ]


def test_a_store_that_lets_nobody_list_uploads_is_used_all_the_same(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    proxy.plan(r"GET .*uploads", "403")
    output = small_parts()
    output.write([b"data"])
    output.commit()
    assert s3.data(KEY) == b"data"


def test_a_store_that_knows_no_conditions_gets_none_after_a_look(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    proxy.plan("POST .*uploadId=", "501")
    output = small_parts()
    output.write([sent_data()])
    output.commit()
    assert s3.data(KEY) == sent_data()


def test_a_store_that_talks_much_is_cut_short(s3: S3Server, proxy: FaultyProxy) -> None:
    proxy.plan("PUT", "chatter")
    output = small_parts()
    output.write([b"data"])
    with pytest.raises(OutputFailure, match="Chatter: bla") as caught:
        output.commit()
    assert len(str(caught.value)) < 600
    output.abandon()


@pytest.mark.parametrize("key", ["a b+c%20d/ü?x=1&y#z.vma", "(a)*'!;:@$,=~/..vma"])
def test_a_key_may_have_any_letters(s3: S3Server, key: str) -> None:
    output = ObjectOutput(f"s3://{BUCKET}/{key}", first_part_bytes=LEAST)
    output.write([sent_data()])
    output.commit()
    assert s3.data(key) == sent_data()
    with pytest.raises(OutputFailure, match="exists"):
        ObjectOutput(f"s3://{BUCKET}/{key}")


def test_plain_http_needs_to_be_allowed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(UsageError, match=r"anybody on the way could read .*AWS_ALLOW_HTTP=true"):
        open_output(NAME)


def test_over_https_the_stores_certificate_counts(
    s3: S3Server, need: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (openssl,) = need("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=x"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *words.split(), *more], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with proxy_to(s3.port, tls) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{proxy.port}")
        with pytest.raises(OutputFailure, match="certificate verify failed"):
            small_parts()
        assert proxy.requests == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        output = small_parts()
        output.write([sent_data()])
        output.commit()
    assert s3.data(KEY) == sent_data()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("s3://b", "'b' is not a valid bucket name: that has 3 to 255 letters"),
        ("s3://ab/key", "'ab' is not a valid bucket name: that has 3 to 255 letters"),
        ("s3://bu cket/a", "'bu cket' is not a valid bucket name"),
        ("s3://bucket", "names no object in the bucket: use s3://BUCKET/KEY"),
        ("s3://bucket/", "names no object in the bucket"),
        ("s3://bucket/folder/", "names no object in the bucket"),
        ("s3://bucket/a//b", "empty, . and .. parts"),
        ("s3://bucket/../b", "empty, . and .. parts"),
        ("s3://bucket/./b", "empty, . and .. parts"),
        ("s3://bucket/a\nb", "control characters are refused"),
        ("s3://bucket/" + 1025 * "k", "at most 1024 bytes"),
    ],
)
def test_a_word_that_names_no_object_is_wrong_use_and_says_what_is_wrong(
    name: str, why: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        open_output(name)


def test_parts_grow_so_that_a_large_archive_fits_and_a_small_one_takes_little_memory() -> None:
    sizes = [part_bytes(number, 16 << 20) for number in range(1, MAX_PARTS + 1)]
    assert sizes[:2000] == [16 << 20] * 2000
    assert max(sizes) == 512 << 20
    assert sum(sizes) > 2.4 * (1 << 40)
    assert sizes == sorted(sizes)


def test_what_does_not_fit_into_an_upload_fails_in_words(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_module, "MAX_PARTS", 1)
    output = small_parts()
    with pytest.raises(Failure, match="is larger than an upload of 1 parts can be"):
        output.write([sent_data()])
    output.abandon()
    assert s3.uploads() == []


def test_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(UsageError, match=r"needs botocore: pip install 'vmapipe\[s3\]'"):
        open_output(NAME)

# SPDX-License-Identifier: Apache-2.0
"""Frames and messages between producer and archiver as bytes: what goes in comes out, all else is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.messages import (
    CONTROLS,
    U64,
    UUID,
    controls,
    data,
    data_frames,
    encode,
    refusal,
)
from vmapipe.clusters.sizes import CLUSTER_BYTES, MAX_CLUSTERS
from vmapipe.protocol import limits
from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.schema import pack
from vmapipe.protocol.transfer import (
    ClusterFrame,
    Control,
    Fail,
    Hello,
    Message,
    Refuse,
    RunFrame,
    UnchangedRun,
    Welcome,
    decode,
    encode_control,
    encode_run,
    encode_unchanged,
    payload_fault,
    run_fault,
    sayable,
)

FORMS: list[type[bytes] | type[bytearray] | type[memoryview]] = [bytes, bytearray, memoryview]


def control(name: str, **fields: Any) -> bytes:
    return bytes(msgpack.packb([name, fields]))


# --- what goes in comes out ---


@given(controls | data_frames)
def test_decoding_an_encoded_message_gives_it_back(message: Message) -> None:
    read = decode(encode(message))
    assert (type(read), read) == (type(message), message)


@given(controls | data_frames, st.sampled_from(FORMS))
@settings(max_examples=40)
def test_parts_may_be_any_buffers(
    message: Message, form: type[bytes] | type[bytearray] | type[memoryview]
) -> None:
    assert decode([form(part) for part in encode(message)]) == message


def test_the_payload_of_a_run_is_not_copied() -> None:
    payload = bytearray(4096)
    parts = encode_run(1, 1, 0, 1, b"\0\1", payload)
    assert parts[-1] is payload
    message = decode(parts)
    assert isinstance(message, RunFrame)
    assert message.payload.obj is payload


def test_a_run_without_data_has_no_third_part_and_may_have_an_empty_one() -> None:
    parts = encode_run(1, 1, 0, 5, b"", b"")
    assert len(parts) == 2
    assert decode([*parts, b""]) == decode(parts)


def test_masks_that_are_all_zero_are_a_run_of_zeroes() -> None:
    message = decode(encode_run(1, 1, 0, 2, bytes(4), b""))
    assert message == RunFrame(1, 1, 0, 2, bytes(4), memoryview(b""))


def test_integers_need_not_be_packed_in_their_shortest_form() -> None:
    parts = [
        bytes.fromhex("cf0000000000000001"),
        bytes.fromhex("dd00000003 ce00000001 cd0000 c400"),
    ]
    assert decode(parts) == ClusterFrame(1, 1, 0, b"")


# --- control messages ---


@pytest.mark.parametrize("message", CONTROLS, ids=lambda m: type(m).__name__)
def test_unknown_keys_of_a_known_message_are_ignored(message: Control) -> None:
    name, fields = msgpack.unpackb(encode_control(message)[0])
    assert decode([control(name, **fields, later=[1, 2], other=None)]) == message


@pytest.mark.parametrize(
    ("message", "field"),
    [(m, f) for m in CONTROLS for f in m._fields],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_every_key_is_needed_and_held_to_its_type(message: Control, field: str) -> None:
    name, fields = msgpack.unpackb(encode_control(message)[0])
    own = type(fields[field])
    strangers: list[object] = [None, 1.5, 2.0, [], {}, [1], "x" * 4097, -1, b"1", b""]
    strangers += [value for value in (True, 1, "1") if type(value) is not own]
    if (name, field) in (("HELLO", "session"), ("WELCOME", "digest_key"), ("HAVE", "digests")):
        strangers.remove(b"")  # none
    if (name, field) == ("HAVE", "digests"):
        strangers.remove(b"1")  # which is for the receiver to judge
    for stranger in strangers:
        raw = control(name, **(fields | {field: stranger}))
        assert refusal(raw).code == "malformed", stranger
    del fields[field]
    if field not in message._field_defaults:
        assert refusal(control(name, **fields)).code == "malformed"
    else:
        default = {field: message._field_defaults[field]}
        assert decode([control(name, **fields)]) == message._replace(**default)


@pytest.mark.parametrize("name", ["", "hello", "HELLO ", "QUIT", "x" * 5000, "CLUSTERFRAME"])
def test_an_unknown_message_is_malformed(name: str) -> None:
    error = refusal(control(name))
    assert error.code == "malformed"
    assert len(error.reason) < 100


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        "PING",
        b"PING",
        [],
        ["PING"],
        ["PING", {}, 1],
        ["PING", []],
        ["PING", None],
        [b"PING", {}],
        [1, {}],
        {"PING": {}},
        [["PING"], {}],
        [None, {}],
    ],
    ids=repr,
)
def test_what_is_no_pair_of_name_and_map_is_malformed(value: object) -> None:
    assert refusal(msgpack.packb(value)).code == "malformed"


@pytest.mark.parametrize("version", [0, 2, 3, U64])
@pytest.mark.parametrize("name", ["HELLO", "WELCOME"])
def test_another_version_is_named_before_its_other_keys_are_looked_at(
    name: str, version: int
) -> None:
    error = refusal(control(name, version=version))
    assert error.code == "version"
    assert str(version) in error.reason


@pytest.mark.parametrize("version", [True, -1, "1", None, 1.0])
def test_a_version_that_is_no_number_is_malformed(version: object) -> None:
    assert refusal(control("HELLO", version=version)).code == "malformed"


@pytest.mark.parametrize(
    "name", ["", "a\nb", "a\0", "\x1b[2J", "\u202e", "x" * 1025, "é" * 513, "\x9b"], ids=ascii
)
def test_a_device_name_that_nobody_could_print_is_malformed(name: str) -> None:
    raw = control("HELLO", version=1, job=UUID, device=name, size=1)
    assert refusal(raw).code == "malformed"


@pytest.mark.parametrize("name", ["x" * 1024, "é" * 512, "a b", "../x", "vmstate"])
def test_a_device_name_within_the_limit_is_taken(name: str) -> None:
    message = decode([control("HELLO", version=1, job=UUID, device=name, size=1)])
    assert isinstance(message, Hello)
    assert message.device == name


def test_a_name_that_is_no_utf8_is_malformed() -> None:
    raw = control("HELLO", version=1, job=UUID, device="QQ", size=1)
    for bad in (b"\xff\xfe", b"\xed\xa0", b"\xc0\x80"):
        assert refusal(raw.replace(b"QQ", bad)).code == "malformed"


@pytest.mark.parametrize("heartbeat_s", [0, limits.MAX_HEARTBEAT_S + 1, U64])
def test_a_heartbeat_that_no_timer_should_wait_for_is_malformed(heartbeat_s: int) -> None:
    fields = Welcome(1, 1, 1, 1, 1)._asdict() | {"heartbeat_s": heartbeat_s}
    assert refusal(control("WELCOME", **fields)).code == "malformed"


@pytest.mark.parametrize("dev_id", [0, 255, U64])
def test_a_dev_id_that_no_archive_has_is_malformed(dev_id: int) -> None:
    fields = Welcome(1, 1, 1, 1, 1)._asdict() | {"dev_id": dev_id}
    assert refusal(control("WELCOME", **fields)).code == "malformed"
    assert refusal(*data(1, [dev_id, 0, b""])).code == "malformed"


def test_the_longest_reason_is_taken_and_fits_a_control_message() -> None:
    message = Refuse("malformed", "\U0010ffff" * limits.MAX_REASON_CHARS)
    assert decode(encode_control(message)) == message


def test_a_control_message_above_the_limit_is_too_large() -> None:
    raw = control("PING", later="x" * (limits.MAX_CONTROL_BYTES - 20))
    decode([raw])
    assert refusal(raw + bytes(limits.MAX_CONTROL_BYTES - len(raw) + 1)).code == "too-large"


def test_more_keys_than_the_limit_are_malformed() -> None:
    decode([control("PING", **{f"k{n}": n for n in range(limits.MAX_MAP_ITEMS)})])
    raw = control("PING", **{f"k{n}": n for n in range(limits.MAX_MAP_ITEMS + 1)})
    assert refusal(raw).code == "malformed"


# --- data messages ---


@pytest.mark.parametrize("count", [0, 4, 5, 100])
def test_a_message_has_one_to_three_parts(count: int) -> None:
    assert refusal(*[control("PING")] * count).code == "malformed"


@pytest.mark.parametrize(
    "number", [0, -1, True, False, None, 1.0, "1", b"\1", [1], {}, {"a": 1}], ids=repr
)
def test_a_data_message_needs_a_number(number: object) -> None:
    assert refusal(*data(number, [1, 0, b""])).code == "malformed"


def test_a_number_part_above_the_limit_is_too_large() -> None:
    assert refusal(bytes(17), msgpack.packb([1, 0, b""])).code == "too-large"


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(frame, id=repr(frame))
        for frame in (
            None,
            1,
            b"",
            [],
            [1],
            [1, 0],
            [1, ""],
            [1, None],
            [1, b""],
            [1, bytes(13)],
            [1, bytes(15)],
            [0, bytes(14)],
            [1, [bytes(14)]],
            [1, 0, 1, b"", 0],
            [True, 0, b""],
            [1, True, b""],
            [1, -1, b""],
            [1, 0.0, b""],
            [1, 0, ""],
            [1, 0, "text"],
            [1, 0, None],
            [1, 0, [b""]],
            [1, 1 << 32, b""],
            [1, U64, b""],
            {"a": 1},
            [[1], 0, b""],
            [1, 0, 0, b""],
            [1, 0, True, b""],
            [1, 0, -1, b""],
            [1, -1, 1, b""],
            [1, 0, 1, ""],
            [1, 0, 1, None],
            [1, 0, 1.0, b""],
            [1, 1 << 32, 1, b""],
            [1, (1 << 32) - 1, 2, b""],
            [1, U64, 1, b""],
            [1, 0, 1, b"\0"],
            [1, 0, 1, b"\0\0\0"],
            [1, 0, 2, b"\0\0"],
            [1, 0, 1, b"\0\0\0\0"],
            [1, 0, 1, b"\0\1", -1],
            [1, 0, 1, b"\0\1", None],
            [1, 0, 1, b"\0\1", True],
            [1, 0, 1, b"\0\1", b""],
            [1, 0, 2, b"\0\1", 0],
            [1, 0, 1, b"\0\1", 0, 0],
        )
    ],
)
def test_a_frame_of_another_form_is_malformed(frame: object) -> None:
    assert refusal(*data(1, frame)).code == "malformed"


def test_a_cluster_frame_with_a_third_part_is_malformed() -> None:
    assert refusal(*data(1, [1, 0, b""], b"")).code == "malformed"


def test_a_run_in_shared_memory_with_a_third_part_is_malformed() -> None:
    assert refusal(*data(1, [1, 0, 1, b"\0\1", 0], bytes(4096))).code == "malformed"


def test_a_run_in_shared_memory_is_held_to_the_limits_of_a_run() -> None:
    most = limits.MAX_PAYLOAD_BYTES // CLUSTER_BYTES
    full = b"\xff\xff" * most
    decode(data(1, [1, 0, most, full, U64]))
    assert refusal(*data(1, [1, 0, most + 1, full + b"\0\1", 0])).code == "too-large"
    assert refusal(*data(1, [1, 0, 32769, bytes(65538), 0])).code == "too-large"


def test_scattered_clusters_with_a_third_part_are_malformed() -> None:
    assert refusal(*data(1, [1, bytes(14)], bytes(4096))).code == "malformed"


def test_scattered_clusters_may_be_as_many_as_the_limit_and_not_more() -> None:
    most = limits.MAX_SCATTERED_CLUSTERS
    decode(data(1, [1, bytes(14 * most)]))
    assert refusal(*data(1, [1, bytes(14 * (most + 1))])).code == "too-large"


def test_scattered_clusters_may_have_as_much_data_as_a_run_and_not_more() -> None:
    most = limits.MAX_PAYLOAD_BYTES // CLUSTER_BYTES
    full = (b"\xff" * 14) * most
    decode(data(1, [1, full]))
    assert refusal(*data(1, [1, full + bytes(13) + b"\1"])).code == "too-large"


def test_a_cluster_of_more_than_64_kib_is_too_large() -> None:
    decode(data(1, [1, 0, bytes(65536)]))
    assert refusal(*data(1, [1, 0, bytes(65537)])).code == "too-large"
    assert refusal(*data(1, [1, 0, bytes(65600)])).code == "too-large"


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 8192])
def test_a_payload_that_the_masks_deny_is_malformed(size: int) -> None:
    assert refusal(*data(1, [1, 0, 1, b"\0\1"], bytes(size))).code == "malformed"


def test_data_without_masks_is_malformed() -> None:
    assert refusal(*data(1, [1, 0, 1, b""], bytes(4096))).code == "malformed"


def test_a_run_may_have_as_much_data_as_the_limit_and_not_more() -> None:
    most = limits.MAX_PAYLOAD_BYTES // CLUSTER_BYTES
    decode(data(1, [1, 0, most, b"\xff\xff" * most], bytes(limits.MAX_PAYLOAD_BYTES)))
    more = data(
        1, [1, 0, most + 1, b"\xff\xff" * most + b"\0\1"], bytes(limits.MAX_PAYLOAD_BYTES + 4096)
    )
    assert refusal(*more).code == "too-large"


def test_a_run_may_have_as_many_clusters_as_the_limit_and_not_more() -> None:
    decode(data(1, [1, 0, limits.MAX_RUN_CLUSTERS, b""]))
    assert refusal(*data(1, [1, 0, limits.MAX_RUN_CLUSTERS + 1, b""])).code == "too-large"
    assert refusal(*data(1, [1, 0, U64, b""])).code == "too-large"


def test_a_run_may_have_as_many_masks_as_the_limit_and_not_more() -> None:
    most = limits.MAX_MASKS_BYTES // 2
    decode(data(1, [1, 0, most, bytes(2 * most)]))
    assert refusal(*data(1, [1, 0, most + 1, bytes(2 * most + 2)])).code == "too-large"


def test_the_last_cluster_of_the_largest_disk_is_taken() -> None:
    assert decode(data(1, [254, (1 << 32) - 1, b""])) == ClusterFrame(1, 254, (1 << 32) - 1, b"")
    message = decode(data(1, [254, (1 << 32) - 7, 7, b""]))
    assert isinstance(message, RunFrame)
    assert message.first_cluster + message.count == 1 << 32


# --- this side's own mistakes ---


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, b"short", "a", 1),
        Hello(1, UUID, "", 1),
        Hello(1, UUID, "a\n", 1),
        Hello(1, UUID, "\udce9", 1),
        Hello(1, UUID, "x" * 1025, 1),
        Hello(1, UUID, "a", -1),
        Hello(1, UUID, "a", 1 << 64),
        Hello(1, UUID, "a", True),
        Hello(1, UUID, "a", 1, "\udce9"),
        Welcome(1, 0, 1, 1, 1),
        Welcome(1, 1, 1, 1, 0),
        Fail("x" * 4097),
        Fail("\udce9"),
    ],
    ids=ascii,
)
def test_what_the_peer_would_refuse_is_not_sent(message: Control) -> None:
    with pytest.raises(LocalProtocolError):
        encode_control(message)


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=5000))
@settings(max_examples=50)
def test_any_text_becomes_sayable(text: str) -> None:
    said = sayable(text)
    assert decode(encode_control(Fail(said))) == Fail(said)
    assert sayable(said) == said


def test_a_reason_that_names_an_odd_file_stays_readable() -> None:
    assert sayable("cannot read caf\udce9.img") == "cannot read caf\\udce9.img"
    assert len(sayable("\udce9" * 4096)) == limits.MAX_REASON_CHARS


@given(st.integers(-2, 1 << 33), st.integers(-2, 1 << 21), st.binary(max_size=9), st.integers(0, 5))
def test_a_run_without_fault_is_decoded_and_one_with_a_fault_refused(
    first: int, count: int, masks: bytes, blocks: int
) -> None:
    size_bytes = blocks * 4096
    fault = run_fault(first, count, masks, size_bytes) or payload_fault(masks, size_bytes)
    if first < 0 or count < 0:
        assert fault is not None
        return
    parts = data(1, [1, first, count, masks], bytes(blocks * 4096))
    if fault is None:
        assert isinstance(decode(parts), RunFrame)
    else:
        assert refusal(*parts).code == fault[0]


@pytest.mark.parametrize(
    ("first", "count"), [(-1, 1), (0, 0), (0, -1), (MAX_CLUSTERS, 1), (1, MAX_CLUSTERS)]
)
def test_unchanged_clusters_that_no_device_has_are_malformed(first: int, count: int) -> None:
    assert refusal(pack(1), pack([1, first, count])).code == "malformed"


def test_unchanged_clusters_may_be_a_whole_device() -> None:
    parts = encode_unchanged(1, 1, 0, MAX_CLUSTERS)
    assert decode(parts) == UnchangedRun(1, 1, 0, MAX_CLUSTERS)


def test_unchanged_clusters_with_a_third_part_are_malformed() -> None:
    assert refusal(*encode_unchanged(1, 1, 0, 1), b"x").code == "malformed"

# SPDX-License-Identifier: Apache-2.0
"""Words of the command line."""

from __future__ import annotations

import argparse

import pytest

from vmapipe.runtime.arguments import check_endpoint, job_id, make_parser, size, split_named
from vmapipe.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("512", 512), ("4K", 4096), ("1.5m", 3 << 19), ("2GiB", 2 << 30), ("1T", 1 << 40)],
)
def test_sizes_take_suffixes_of_1024(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "1X", "nan", "inf", "1e30", "K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a valid size|out of range"):
        size(text)


def test_a_job_id_is_16_bytes_with_or_without_dashes() -> None:
    plain = "00112233445566778899aabbccddeeff"
    dashed = "00112233-4455-6677-8899-aabbccddeeff"
    assert job_id(plain) == job_id(dashed) == bytes.fromhex(plain)
    for wrong in ("", "00", plain + "00", "zz" * 16):
        with pytest.raises(argparse.ArgumentTypeError):
            job_id(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/vm.raw", ("vm.raw", "/srv/vm.raw")),
        ("drive-scsi0=/srv/vm.raw", ("drive-scsi0", "/srv/vm.raw")),
        ("a=b=c", ("a", "b=c")),
        ("/srv/odd=name", ("odd=name", "/srv/odd=name")),
    ],
)
def test_a_disk_is_named_or_takes_its_files_name(text: str, expected: tuple[str, str]) -> None:
    assert split_named(text) == expected


@pytest.mark.parametrize("text", ["=x", "a="])
def test_half_a_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        split_named(text)


def test_plain_tcp_needs_the_explicit_word() -> None:
    with pytest.raises(UsageError, match=r"--insecure-plain-tcp"):
        check_endpoint("tcp://127.0.0.1:7777", plain_tcp=False)
    check_endpoint("tcp://127.0.0.1:7777", plain_tcp=True)
    check_endpoint("ipc:///run/x", plain_tcp=False)
    for wrong in (
        "tcp://h",
        "tcp://h:x",
        "tcp://h:99999",
        "inproc://x",
        "/run/x",
        "ipc://",
        "ipc://" + "x" * 108,
    ):
        with pytest.raises(UsageError):
            check_endpoint(wrong, plain_tcp=True)


def test_a_wrong_option_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("vmapipe x", "", "")
    parser.add_argument("--speed", type=size)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--speed", "fast"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "vmapipe x: argument --speed: 'fast' is not a valid size (like 512K, 10M, 1.5G) "
        "(see vmapipe x --help)\n"
    )

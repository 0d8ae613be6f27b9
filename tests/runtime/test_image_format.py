# SPDX-License-Identifier: Apache-2.0
"""Which other files an image refers to, out of any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.runtime.image_format import Reference, references

FORMATS = ("qcow2", "qcow", "qed", "vmdk", "vdi", "raw")


def found_in(image_format: str, image: bytes) -> list[Reference]:
    return references(image_format, lambda offset, length: image[offset : offset + length])


@given(st.sampled_from(FORMATS), st.sampled_from([b"QFI\xfb", b"QED\0", b"KDMV", b""]), st.binary())
def test_no_bytes_are_too_strange_to_look_at(image_format: str, magic: bytes, rest: bytes) -> None:
    for reference in found_in(image_format, magic + rest):
        assert str(reference).isprintable()
        assert len(str(reference)) < 2000


@given(st.integers(1, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), st.integers(1, 3))
def test_a_backing_file_is_told_wherever_its_name_is_said_to_be(
    offset: int, length: int, version: int
) -> None:
    image = struct.pack(">4sIQI", b"QFI\xfb", version, offset, length).ljust(512, b"\0")
    assert [found.what for found in found_in("qcow2", image)] == ["backing file"]


@pytest.mark.parametrize("extensions", [b"", b"\x44\x41\x54\x41\0\0\0\x04name" + bytes(12)])
def test_a_data_file_is_told_with_and_without_its_name(extensions: bytes) -> None:
    head = struct.pack(">4sIQI", b"QFI\xfb", 3, 0, 0).ljust(72, b"\0")
    head += struct.pack(">QQQII", 4, 0, 0, 4, 104)
    name = "name" if extensions else ""
    assert found_in("qcow2", head + extensions) == [Reference("data file", name)]


def test_a_qcow2_without_a_reference_has_none() -> None:
    assert found_in("qcow2", struct.pack(">4sIQI", b"QFI\xfb", 3, 0, 0).ljust(512, b"\0")) == []


def test_a_vmdk_that_goes_by_its_embedded_descriptor_has_extents() -> None:
    descriptor = b'# Disk DescriptorFile\nRW 1 FLAT "/etc/shadow" 0\n'
    head = struct.pack("<4sIIQQQQ", b"KDMV", 3, 0, 0, 128, 1, 20).ljust(512, b"\0")
    assert found_in("vmdk", head + descriptor) == [Reference("extent", "/etc/shadow")]

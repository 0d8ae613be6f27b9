# SPDX-License-Identifier: Apache-2.0
"""NBD URIs: what they say, and that no message of ours repeats a user or a password."""

from __future__ import annotations

import os
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmapipe.producer.pull.uri import NbdUri, NbdUriError, is_nbd_uri, parse_nbd_uri


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nbd://host", NbdUri("", "host")),
        ("nbd://host/", NbdUri("", "host")),
        ("nbd://host:1234/a/b", NbdUri("a/b", "host", 1234)),
        ("nbd://[::1]:1234/a", NbdUri("a", "::1", 1234)),
        ("nbd://host//a", NbdUri("/a", "host")),
        ("nbd://host/a%20b%3F", NbdUri("a b?", "host")),
        ("nbd+unix:///a?socket=/run/x.sock", NbdUri("a", socket="/run/x.sock")),
        ("nbd+unix://?socket=x+y.sock", NbdUri("", socket="x+y.sock")),
        ("NBD+UNIX:///a?socket=%2Frun%2Fx", NbdUri("a", socket="/run/x")),
        ("nbds://u@host/a", NbdUri("a", "host", tls=True, user="u")),
        (
            "nbds://host/a?tls-certificates=/etc/pki&tls-hostname=other",
            NbdUri("a", "host", tls=True, certificates="/etc/pki", hostname="other"),
        ),
        (
            "nbds+unix://u@/a?socket=/s&tls-psk-file=/k",
            NbdUri("a", socket="/s", tls=True, user="u", psk_file="/k"),
        ),
    ],
)
def test_a_uri_says_where_the_export_is(text: str, wanted: NbdUri) -> None:
    assert is_nbd_uri(text)
    assert parse_nbd_uri(text) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://host/", "begins with one of"),
        ("nbd+vsock://2/", "begins with one of"),
        ("nbd://", "no host"),
        ("nbd:///a", "no host"),
        ("nbd://host:port/", "host or port"),
        ("nbd://host:99999/", "host or port"),
        ("nbd://[::1/", "host or port"),
        ("nbd://host/a?socket=/s", r"socket= belongs to nbd\+unix://"),
        ("nbd+unix:///a", "the socket is missing"),
        ("nbd+unix://host/a?socket=/s", "no host is named"),
        ("nbd+unix:///a?socket=" + "x" * 108, "1..107 bytes"),
        ("nbd+unix:///a?socket=/s&socket=/t", "comes twice"),
        ("nbd+unix:///a?socket=", "empty"),
        ("nbd://host/a?tls-certificates=/d", "belongs to nbds://"),
        ("nbds://host/a?tls-certificate=/d", "a parameter is not known"),
        ("nbds://host/a?tls-certificates=/d&tls-psk-file=/k", "choose one"),
        ("nbds://u:secret@host/a", "NBD has no passwords"),
        ("nbd://host/a%00b", "NUL"),
        ("nbd://host/" + "x" * 5000, "4096"),
        ("nbd://host/a#b", "#"),
    ],
)
def test_what_is_not_a_usable_uri_is_said_plainly(text: str, words: str) -> None:
    with pytest.raises(NbdUriError, match=words):
        parse_nbd_uri(text)


@given(
    st.sampled_from(["nbd", "nbds", "nbd+unix", "nbds+unix"]),
    st.text("abc/?#@:%[]&=", max_size=6),
    st.sampled_from(["host", "[::1]", ""]),
    st.text("ab/?#@:%&=", max_size=8),
    st.sampled_from(["", "?socket=/s", "?tls-psk-file=/k", "?socket=/s&tls-hostname=h"]),
)
def test_no_user_or_password_is_shown_or_told(
    scheme: str, more: str, host: str, path: str, query: str
) -> None:
    for user in ("SECRET@", f"u:SECRET{more}@", f"SECRET{more}:x@"):
        try:
            said = parse_nbd_uri(f"{scheme}://{user}{host}/{path}{query}").shown
        except NbdUriError as error:
            said = str(error)
        else:
            # Behind a "/", "?" or "#" it is no user, and was never one.
            said = "" if set("/?#") & set(more) else said
        assert "SECRET" not in said


@given(st.text(max_size=20).filter(lambda t: "\0" not in t), st.integers(1, 65535), st.booleans())
def test_what_is_shown_is_a_uri_of_the_same_export(name: str, port: int, tls: bool) -> None:
    uri = NbdUri(name, "host", port, tls=tls)
    assert parse_nbd_uri(uri.shown) == uri
    uri = NbdUri(name, socket="/run/a b.sock", tls=tls)
    assert parse_nbd_uri(uri.shown) == uri


@given(st.binary(min_size=1, max_size=50).filter(lambda raw: b"\0" not in raw))
def test_a_sockets_path_may_have_any_bytes_and_an_exports_name_is_utf_8(raw: bytes) -> None:
    quoted = quote(raw)
    uri = parse_nbd_uri(f"nbd+unix:///?socket={quoted}")
    assert os.fsencode(uri.socket) == raw
    assert uri.shown.isascii()
    assert parse_nbd_uri(uri.shown) == uri
    if not (name := raw.removeprefix(b"/")).isascii():
        with pytest.raises(NbdUriError, match="is not UTF-8"):
            parse_nbd_uri(f"nbd://host/{quote(name)}%ff")

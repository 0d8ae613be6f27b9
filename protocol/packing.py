# SPDX-License-Identifier: Apache-2.0
"""Plain values to bytes and back. The only file that knows msgpack.

Nothing is unpacked before its size was checked; what does not fit raises
RemoteProtocolError.
"""

from __future__ import annotations

from typing import Any

import msgpack

from vmapipe.protocol import limits
from vmapipe.protocol.errors import RemoteProtocolError

#: Of a message: ZeroMQ's multipart messages are lists of them.
Part = bytes | bytearray | memoryview


def pack(value: Any) -> bytes:
    """Numbers, bytes, str, lists and maps of them."""
    return msgpack.packb(value)  # type: ignore[no-any-return]


def unpack(part: Part, max_bytes: int, max_items: int = limits.MAX_ARRAY_ITEMS) -> Any:
    """A part's value, if it is at most `max_bytes` long and no array of it has more items."""
    size = memoryview(part).nbytes
    if size > max_bytes:
        raise RemoteProtocolError("too-large", f"a part of {size} bytes, at most {max_bytes}")
    try:
        return msgpack.unpackb(
            part,
            raw=False,
            strict_map_key=True,
            max_str_len=limits.MAX_CONTROL_BYTES,
            max_bin_len=max_bytes,
            max_array_len=max_items,
            max_map_len=limits.MAX_MAP_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError("malformed", f"no msgpack: {error}") from error

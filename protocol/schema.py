# SPDX-License-Identifier: Apache-2.0
"""The codec of all dialogues: the annotations of a message type are the checks of its fields.

A message type is a NamedTuple. Each of its fields is annotated with
a plain type (int, bytes, str, bool), a tuple of such types, or another NamedTuple,
and may carry checks: `size: Annotated[int, between(1, 254)]`. A `Dialogue` holds the
message types of one direction and turns them into bytes and back, in one of two shapes:

- `keyed`: [NAME, {field: value, ...}]; unknown keys are ignored, and a field with a
  default may be missing, so that versions of a program understand each other;
- positional: [NAME, value, ...], each field in its order; for processes of one job.

A type whose first field is `version` is refused with the code "version" when that
differs from `limits.VERSION`, before anything else of it is looked at: another
version may have other fields. A type with a method `fault()` has the last word
about fields that only make sense together.
"""

from __future__ import annotations

import itertools
import struct
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgpack

from vmapipe.protocol import limits
from vmapipe.protocol.errors import LocalProtocolError, RemoteProtocolError

#: A part of a message: ZeroMQ's multipart messages are lists of them.
Part = bytes | bytearray | memoryview


#: Numbers, bytes, str, lists and maps of them to bytes.
pack: Callable[[Any], bytes] = msgpack.packb


def unpack(part: Part, max_bytes: int, max_items: int = limits.MAX_ARRAY_ITEMS) -> Any:
    """Unpack a part of at most `max_bytes` bytes whose arrays have at most `max_items` items."""
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
        raise RemoteProtocolError("malformed", f"not valid msgpack: {error}") from error


#: Returns whether a value of the field's plain type is valid.
Check = Callable[[Any], bool]
# Turns an unpacked value into what the annotation says. Raises ValueError.
_Reader = Callable[[Any], Any]
_MISSING = object()


class Range(NamedTuple):
    """A check for whole numbers, both ends included."""

    low: int
    high: int

    def __call__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)


def between(low: int, high: int) -> Range:
    """Whole numbers from `low` to `high`."""
    return Range(low, high)


def lengths(low: int, high: int) -> Check:
    """Texts, bytes or tuples of `low` to `high` characters, bytes or items."""
    return lambda value: low <= len(value) <= high


def length_of(*allowed: int) -> Check:
    """Bytes of one of these lengths."""
    return lambda value: len(value) in allowed


class Packed(NamedTuple):
    """A tuple of whole numbers that travels as one string of bytes, `code` as in `struct`."""

    code: str

    def to_wire(self, value: Sequence[int]) -> bytes:
        return struct.pack(f">{len(value)}{self.code}", *value)

    def read(self, value: Any) -> tuple[int, ...]:
        if type(value) is not bytes:
            raise ValueError(f"{value!r:.40} is not bytes")
        try:
            return struct.unpack(f">{len(value) // struct.calcsize(self.code)}{self.code}", value)
        except struct.error:
            raise ValueError(f"{len(value)} bytes are not whole numbers") from None


class Joined(NamedTuple):
    """A tuple of byte strings of one size that travels as one string of bytes."""

    size_bytes: int

    def to_wire(self, value: Sequence[bytes]) -> bytes:
        return b"".join(value)

    def read(self, value: Any) -> tuple[bytes, ...]:
        if type(value) is not bytes or len(value) % self.size_bytes:
            raise ValueError(f"not pieces of {self.size_bytes} bytes")
        return struct.unpack(f"{self.size_bytes}s" * (len(value) // self.size_bytes), value)


def _is_text(value: str) -> bool:
    # What comes out of msgpack has no surrogates; the name of a file may.
    return len(value) <= limits.MAX_REASON_CHARS and not any(
        "\ud800" <= char <= "\udfff" for char in value
    )


def _is_name(value: str) -> bool:
    return bool(value) and value.isprintable() and len(value.encode()) <= limits.MAX_NAME_BYTES


Uint = Annotated[int, between(0, (1 << 64) - 1)]
Uuid = Annotated[bytes, length_of(limits.UUID_BYTES)]
UuidOrEmpty = Annotated[bytes, length_of(0, limits.UUID_BYTES)]
Text = Annotated[str, _is_text]
#: The name of a device or a configuration.
Name = Annotated[str, _is_name]
DevId = Annotated[int, between(1, limits.MAX_DEV_ID)]
Heartbeat = Annotated[int, between(1, limits.MAX_HEARTBEAT_S)]


def is_uint(value: object) -> typing.TypeGuard[int]:
    """Return whether this unpacked value is a whole number of at most 64 bits."""
    return type(value) is int and 0 <= value < 1 << 64


class Dialogue:
    """The message types of one direction, and their encoding.

    `limit_of`: the bytes that a message of this name may have. `names`: the wire names of
    types that are not called so; the others have their own name in capital letters.
    """

    def __init__(
        self,
        *kinds: type[Any],
        keyed: bool,
        max_bytes: int | Callable[[str], int],
        max_items: int = limits.MAX_ARRAY_ITEMS,
        names: Mapping[type[Any], str] | None = None,
    ) -> None:
        self._keyed = keyed
        self._limit_of = max_bytes if callable(max_bytes) else lambda _: max_bytes
        self._max_items = max_items
        names = names or {}
        self._layouts: dict[type[Any], _Layout] = {}
        for kind in kinds:
            name = names.get(kind, kind.__name__.upper())
            self._layouts[kind] = _Layout(name, kind, self._limit_of(name))
        self._by_name = {layout.name: layout for layout in self._layouts.values()}
        self._max_bytes = max(layout.max_bytes for layout in self._layouts.values())

    def encode(self, message: Any, *, checked: bool = True) -> list[Part]:
        """Raises LocalProtocolError for what the peer would refuse; unchecked: nothing is."""
        layout = self._layouts[type(message)]
        values: list[Any] = list(map(getattr, itertools.repeat(message), layout.names))
        for index, to_wire in layout.writers:
            values[index] = to_wire(values[index])
        if checked:
            try:
                layout.read(values)
            except ValueError as error:
                raise LocalProtocolError(str(error)) from None
        if self._keyed:
            raw = pack([layout.name, dict(zip(layout.names, values, strict=True))])
        else:
            raw = pack([layout.name, *values])
        if checked and len(raw) > layout.max_bytes:
            raise LocalProtocolError(f"{layout.name}: {len(raw)} bytes, at most {layout.max_bytes}")
        return [raw]

    def decode(self, parts: Sequence[Part]) -> Any:
        """Read one message. Raises RemoteProtocolError for anything that is not one of these."""
        name, fields = self.unpack(parts)
        message = self.read(name, fields)
        if message is None:
            raise RemoteProtocolError("malformed", f"an unknown message {name[:40]!r}")
        return message

    def unpack(self, parts: Sequence[Part]) -> tuple[str, Any]:
        """A message's name and its fields, unchecked as yet. Raises RemoteProtocolError."""
        if len(parts) != 1:
            raise RemoteProtocolError("malformed", f"a message of {len(parts)} parts")
        value = unpack(parts[0], self._max_bytes, self._max_items)
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise RemoteProtocolError("malformed", "a message without a name")
        name = value[0]
        layout = self._by_name.get(name)
        limit = layout.max_bytes if layout is not None else self._limit_of(name)
        if memoryview(parts[0]).nbytes > limit:
            raise RemoteProtocolError("too-large", f"{name:.40} of more bytes than it may have")
        if not self._keyed:
            return name, value[1:]
        if len(value) != 2 or not isinstance(value[1], dict):
            raise RemoteProtocolError("malformed", "a control message that is not [name, {...}]")
        return name, value[1]

    def read(self, name: str, fields: Any) -> Any | None:
        """The message of what `unpack` gave; None: not of this dialogue. Raises RemoteProtocolError."""
        layout = self._by_name.get(name)
        if layout is None:
            return None
        given = (
            list(map(fields.get, layout.names, itertools.repeat(_MISSING)))
            if self._keyed
            else fields
        )
        if layout.has_version and given and is_uint(given[0]) and given[0] != limits.VERSION:
            raise RemoteProtocolError(
                "version", f"version {given[0]} is not spoken here, {limits.VERSION} is"
            )
        try:
            message = layout.kind(*layout.read(given))
        except ValueError as error:
            raise RemoteProtocolError("malformed", str(error)) from None
        fault = layout.fault(message) if layout.fault is not None else None
        if fault:
            raise RemoteProtocolError("malformed", f"{name}: {fault}")
        return message


#: A whole number's range, and None; or, of all other fields, what reads the value.
_Row = tuple[int, int, _Reader | None]


class _Layout:
    """One message type, compiled: a row for each field, all checked in one loop.

    A whole number, as most fields are, is checked by its range alone.
    """

    def __init__(self, name: str, kind: type[Any], max_bytes: int) -> None:
        self.name = name
        self.kind = kind
        self.max_bytes = max_bytes
        hints = typing.get_type_hints(kind, include_extras=True)
        # What stands where a keyed message lacks a field; _MISSING: it must be there.
        self._defaults = _defaults_of(kind)
        self.names = tuple(self._defaults)
        self._rows = [_row(hints[field]) for field in self.names]
        # The few fields that travel in another form than msgpack's, by index.
        self.writers = [
            (index, to_wire)
            for index, field in enumerate(self.names)
            if (to_wire := _writer(hints[field])) is not None
        ]
        self.has_version = self.names[:1] == ("version",)
        self.fault: Callable[[Any], str | None] | None = getattr(kind, "fault", None)

    def read(self, given: Sequence[Any]) -> list[Any]:
        """Check the values of all fields, in their order; return them as annotated. Raises ValueError."""
        if len(given) != len(self._rows):
            raise ValueError(f"{self.name} with {len(given)} fields")
        values = []
        for (low, high, read), value in zip(self._rows, given, strict=True):
            if read is None and type(value) is int and low <= value <= high:
                values.append(value)
            else:
                values.append(self._read_other(self.names[len(values)], read, value))
        return values

    def _read_other(self, field: str, read: _Reader | None, value: Any) -> Any:
        if value is _MISSING:
            if self._defaults[field] is _MISSING:
                raise ValueError(f"{self.name} without {field!r}")
            return self._defaults[field]
        if read is None:
            raise ValueError(f"{self.name}: {field}: {value!r:.40} is not valid")
        try:
            return read(value)
        except ValueError as error:
            raise ValueError(f"{self.name}: {field}: {error}") from None


def _defaults_of(kind: type[Any]) -> dict[str, Any]:
    """The names of a type's fields, and the default of each or _MISSING."""
    return {name: kind._field_defaults.get(name, _MISSING) for name in kind._fields}


def _row(hint: Any) -> _Row:
    numbers = _range_of(hint)
    return (0, 0, _reader(hint)) if numbers is None else (numbers.low, numbers.high, None)


def _range_of(hint: Any) -> Range | None:
    """The range of a whole number that has no other check."""
    plain, marks = _take_apart(hint)
    return marks[0] if plain is int and len(marks) == 1 and isinstance(marks[0], Range) else None


def _reader(hint: Any) -> _Reader:
    """Return the function that turns an unpacked value into the annotated type."""
    plain, marks = _take_apart(hint)
    for mark in marks:
        if isinstance(mark, Packed | Joined):
            return mark.read
    if typing.get_origin(plain) is tuple:
        return _checked(list, _tuple_reader(typing.get_args(plain)), marks)
    if hasattr(plain, "_fields"):
        return _record_reader(plain)
    return _checked(plain, None, marks)


def _writer(hint: Any) -> Callable[[Any], Any] | None:
    """Return the function that turns a field into another form; None: msgpack writes it as it is."""
    for mark in _take_apart(hint)[1]:
        if isinstance(mark, Packed | Joined):
            return mark.to_wire
    return None


def _take_apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The plain type, and the checks and marks of an annotation."""
    if typing.get_origin(hint) is Annotated:
        plain, *marks = typing.get_args(hint)
        return plain, tuple(marks)
    return hint, ()


def _checked(base: type[Any], convert: _Reader | None, checks: Sequence[Check]) -> _Reader:
    def read(value: Any) -> Any:
        # Not isinstance for the others: True is not a number here. A message that is to be
        # sent has tuples where one that came has lists.
        if not (isinstance(value, list | tuple) if base is list else type(value) is base):
            raise ValueError(f"{value!r:.40} is not valid")
        for check in checks:
            if not check(value):
                raise ValueError(f"{value!r:.40} is not valid")
        return value if convert is None else convert(value)

    return read


def _tuple_reader(items: tuple[Any, ...]) -> _Reader:
    if len(items) == 2 and items[1] is Ellipsis:
        numbers = _range_of(items[0])
        if numbers is not None:
            return _numbers_reader(*numbers)
        read = _reader(items[0])
        return lambda value: tuple(map(read, value))
    return _fixed_reader([_reader(item) for item in items], tuple)


def _numbers_reader(low: int, high: int) -> _Reader:
    """Numbers come by the dozen in a guard's messages, so in one loop without a call for each."""

    def read(value: list[Any]) -> tuple[int, ...]:
        for item in value:
            if type(item) is not int or not low <= item <= high:
                raise ValueError(f"{item!r:.40} is not valid")
        return tuple(value)

    return read


def _record_reader(kind: Any) -> _Reader:
    hints = typing.get_type_hints(kind, include_extras=True)
    readers = [_reader(hints[field]) for field in kind._fields]
    return _checked(list, _fixed_reader(readers, kind._make), ())


def _fixed_reader(readers: Sequence[_Reader], make: Callable[[Any], Any]) -> _Reader:
    def read(value: list[Any]) -> Any:
        if len(value) != len(readers):
            raise ValueError(f"{len(value)} items where {len(readers)} belong")
        return make(reader(item) for reader, item in zip(readers, value, strict=True))

    return read

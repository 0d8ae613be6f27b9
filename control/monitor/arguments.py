# SPDX-License-Identifier: Apache-2.0
"""The members of a QMP command, checked as QEMU checks them, and in its words. Pure."""

from __future__ import annotations

from typing import Any

from vmapipe.control.qmp.server import QmpError


class Arguments:
    """Members are taken one by one, by any of their spellings; `end` refuses what is left."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members = dict(members)

    def text(self, *spellings: str) -> str | None:
        """Raises QmpError for what is there and no string."""
        value = self._take(spellings)
        if value is not None and not isinstance(value, str):
            raise _wrong_type(spellings, "string")
        return value

    def need_text(self, *spellings: str) -> str:
        """Raises QmpError when it is missing, too."""
        value = self.text(*spellings)
        if value is None:
            raise QmpError(f"Parameter '{spellings[0]}' is missing")
        return value

    def number(self, *spellings: str) -> int | None:
        """An integer from 0 on; JSON's booleans are none. Raises QmpError."""
        value = self._take(spellings)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type(spellings, "integer")
        if not 0 <= value < 1 << 63:
            raise QmpError(f"Parameter '{spellings[0]}' expects a non-negative value")
        return value

    def flag(self, *spellings: str) -> bool:
        """False when it is missing. Raises QmpError."""
        value = self._take(spellings)
        if value is not None and not isinstance(value, bool):
            raise _wrong_type(spellings, "boolean")
        return bool(value)

    def size(self, *spellings: str) -> int | None:
        """Bytes; as a string, with a suffix, and MiB without one: as at the human monitor."""
        for spelling in spellings:
            text = self._members.get(spelling)
            if isinstance(text, str):
                self._members[spelling] = human_size(text)
        return self.number(*spellings)

    def has(self, *spellings: str) -> bool:
        return any(spelling in self._members for spelling in spellings)

    def end(self) -> None:
        """Raises QmpError when there is a member that nobody knows."""
        for name in self._members:
            raise QmpError(f"Parameter '{name}' is unexpected")

    def _take(self, spellings: tuple[str, ...]) -> Any:
        """The first spelling that is there; a second one is left, to be refused."""
        for spelling in spellings:
            if spelling in self._members:
                return self._members.pop(spelling)
        return None


# As QEMU's strtosz with MiB for its default unit.
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate("BKMGTPE")}


def human_size(text: str) -> int:
    """`10` is 10 MiB, `1.5G`, `4096B`. Raises QmpError."""
    word = text.strip().upper()
    unit = word[-1:] if word[-1:] in _UNITS else ""
    number = word[: len(word) - len(unit)]
    digits = number.replace(".", "", 1)
    value = -1.0
    if digits.isascii() and digits.isdecimal():
        value = float(number) * _UNITS[unit or "M"]
    if not 0 <= value < 1 << 63:
        raise QmpError("invalid size")
    return int(value)


def _wrong_type(spellings: tuple[str, ...], expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{spellings[0]}', expected: {expected}")

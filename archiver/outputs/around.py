# SPDX-License-Identifier: Apache-2.0
"""An output around another one: it does something with the bytes, the other one has them."""

from __future__ import annotations

from vmapipe.archiver.outputs.output import Output


class OutputAround:
    """What is asked of it and is the inner output's affair."""

    def __init__(self, inner: Output) -> None:
        self._inner = inner

    @property
    def description(self) -> str:
        return self._inner.description

    @property
    def is_stream(self) -> bool:
        return self._inner.is_stream

    @property
    def written_bytes(self) -> int:
        return self._inner.written_bytes

# SPDX-License-Identifier: Apache-2.0
"""The server's side of the handshake (proto.md, Newstyle and Fixed newstyle negotiation)."""

from __future__ import annotations

from collections.abc import Iterable

from vmapipe.protocol.nbd.constants import (
    IHAVEOPT,
    INIT_PASSWD,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_LIST,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNSUP,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.export import Export
from vmapipe.protocol.nbd.handshake import Handshake
from vmapipe.protocol.nbd.limits import (
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_SKIPPED_BYTES,
    MAX_STRING_BYTES,
)
from vmapipe.protocol.nbd.option import (
    CLIENT_FLAGS,
    GREETING,
    OPTION,
    OptionFault,
    encode_option_reply,
)
from vmapipe.protocol.nbd.server_options import ServerOptions

_WITHOUT_DATA = frozenset({NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY})


class NbdServerHandshake(Handshake):
    """Send `greeting()`; then, while `wanted_bytes`, feed what comes and send what `feed` returns.

    After that either `session` is there and the transmission phase has begun,
    or the client has left with NBD_OPT_ABORT and the connection is to be closed.

    The empty name stands for the only export, where there is just one.
    `structured`: offer structured replies, and with them metadata contexts.
    `listable`: answer NBD_OPT_LIST. Raises LocalProtocolError when two exports
    have the same name.
    """

    def __init__(
        self, exports: Iterable[Export], *, structured: bool = True, listable: bool = True
    ) -> None:
        super().__init__(CLIENT_FLAGS.size, self._take_client_flags)
        #: While true, every option but NBD_OPT_ABORT is answered NBD_REP_ERR_SHUTDOWN.
        self.shutting_down = False
        self._options = ServerOptions(exports, structured=structured, listable=listable)
        self._fixed = False
        self._option = 0
        self._option_count = 0
        # What is wrong with the option, as far as its header tells.
        self._fault: OptionFault | None = None

    def greeting(self) -> bytes:
        """The server speaks first."""
        flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
        return GREETING.pack(INIT_PASSWD, IHAVEOPT, flags)

    def _take_client_flags(self, raw: bytes) -> bytes:
        (flags,) = CLIENT_FLAGS.unpack(raw)
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            raise NbdProtocolError(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & NBD_FLAG_C_FIXED_NEWSTYLE)
        self._options.no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        self._expect_option()
        return b""

    def _expect_option(self) -> None:
        self._intake.expect(OPTION.size)
        self._next = self._take_option

    def _take_option(self, raw: bytes) -> bytes:
        """An option's header. The limits are checked here, before its data comes."""
        magic, self._option, length = OPTION.unpack(raw)
        if magic != IHAVEOPT:
            raise NbdProtocolError(f"no option where one must be (magic {magic:#x})")
        self._option_count += 1
        if self._option_count > MAX_OPTIONS:
            raise NbdProtocolError(f"more than {MAX_OPTIONS} options")
        if self._option == NBD_OPT_EXPORT_NAME:
            if length > MAX_STRING_BYTES:
                raise NbdProtocolError(f"an export name of {length} bytes")
        elif not self._fixed:
            raise NbdProtocolError(f"option {self._option} without fixed newstyle")
        if length > MAX_SKIPPED_BYTES:
            raise NbdProtocolError(f"an option of {length} bytes")
        self._options.begin(self._option)
        self._fault = self._fault_of_header(length)
        # "a server SHOULD ignore any data" of NBD_OPT_ABORT
        keep = self._fault is None and self._option != NBD_OPT_ABORT
        self._intake.expect(length, keep=keep)
        self._next = self._take_data
        return b""

    def _fault_of_header(self, length: int) -> OptionFault | None:
        option = self._option
        if option == NBD_OPT_ABORT:
            return None
        if self.shutting_down:
            return OptionFault(NBD_REP_ERR_SHUTDOWN, "the server is shutting down")
        if option in _WITHOUT_DATA and length:
            return OptionFault(NBD_REP_ERR_INVALID, "this option has no data")
        if option not in self._options.known:
            return OptionFault(NBD_REP_ERR_UNSUP, "this option is not supported")
        if length > MAX_OPTION_BYTES:
            return OptionFault(NBD_REP_ERR_TOO_BIG, f"more than {MAX_OPTION_BYTES} bytes")
        return None

    def _take_data(self, data: bytes) -> bytes:
        option = self._option
        if option == NBD_OPT_ABORT:
            self._next = None
            return encode_option_reply(option, NBD_REP_ACK)
        self._expect_option()
        try:
            if self._fault:
                raise self._fault
            answer = self._options.answer(option, data)
        except OptionFault as fault:
            if option == NBD_OPT_EXPORT_NAME:  # it knows no error reply
                raise NbdProtocolError(f"NBD_OPT_EXPORT_NAME: {fault.message}") from None
            return encode_option_reply(option, fault.reply_type, fault.message.encode())
        self.session = self._options.session
        if self.session:
            self._next = None
        return answer

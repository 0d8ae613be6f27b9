# SPDX-License-Identifier: Apache-2.0
"""The server's side of the handshake (proto.md, Fixed newstyle negotiation, Option types)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    IHAVEOPT,
    INIT_PASSWD,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_NAME,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    ZEROES_BYTES,
    Bytes,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.export import Export
from vmapipe.protocol.nbd.intake import Intake
from vmapipe.protocol.nbd.limits import (
    MAX_LIST_BYTES,
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_SKIPPED_BYTES,
    MAX_STRING_BYTES,
)
from vmapipe.protocol.nbd.option import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    OPTION,
    U32,
    OptionFault,
    encode_infos,
    encode_option_reply,
    encode_server_entry,
    parse_info_query,
    parse_meta_query,
    parse_string,
)
from vmapipe.protocol.nbd.session import MetaContext, Session

_ALLOCATION_ID = 1
_NO_DATA = frozenset({NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY})


class NbdServerHandshake:
    """Send `greeting()`, then feed what comes and send what `feed` returns, while `wanted_bytes`.

    Then either `session` is there, and the transmission phase has begun, or the
    client has left with NBD_OPT_ABORT and the connection is to be closed.

    The empty name stands for the only export, if there is just one.
    `structured`: offer structured replies, and with them metadata contexts.
    `listable`: answer NBD_OPT_LIST.
    """

    def __init__(
        self, exports: Iterable[Export], *, structured: bool = True, listable: bool = True
    ) -> None:
        self.session: Session | None = None
        #: What was fed beyond the end of the handshake: the first bytes of the transmission phase.
        self.unread = b""
        #: True: every option but NBD_OPT_ABORT is answered NBD_REP_ERR_SHUTDOWN.
        self.shutting_down = False
        self._exports = {export.name: export for export in exports}
        if len(self._exports) == 1:
            self._exports.setdefault("", *self._exports.values())
        self._may_be_structured = structured
        self._listable = listable
        self._structured = False
        self._fixed = self._no_zeroes = False
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_of = ""
        self._options = 0
        self._listed_bytes = 0
        self._option = 0
        self._option_fault: OptionFault | None = None
        self._intake = Intake(CLIENT_FLAGS.size)
        # Takes the structure that is complete; None: the handshake is over.
        self._next: Callable[[bytes], bytes] | None = self._client_flags
        self._answers: dict[int, Callable[[bytes], bytes]] = {
            NBD_OPT_EXPORT_NAME: self._export_name,
            NBD_OPT_ABORT: self._abort,
            NBD_OPT_LIST: self._list,
            NBD_OPT_INFO: self._info,
            NBD_OPT_GO: self._go,
        }
        if structured:
            self._answers[NBD_OPT_STRUCTURED_REPLY] = self._structured_reply
            self._answers[NBD_OPT_LIST_META_CONTEXT] = self._list_meta_context
            self._answers[NBD_OPT_SET_META_CONTEXT] = self._set_meta_context

    @property
    def wanted_bytes(self) -> int:
        """Bytes that belong to the handshake for certain; 0: it is over."""
        return self._intake.missing_bytes if self._next else 0

    def greeting(self) -> bytes:
        """The server speaks first."""
        flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
        return GREETING.pack(INIT_PASSWD, IHAVEOPT, flags)

    def feed(self, data: Bytes) -> bytes:
        """Take bytes as they come, cut anywhere; returns what is to be sent.

        More than `wanted_bytes` is no loss: see `unread`. Raises NbdProtocolError.
        """
        if self._next is None:
            raise LocalProtocolError("the handshake is over")
        rest = memoryview(data)
        out = []
        try:
            while self._next:
                rest = self._intake.add(rest)
                if self._intake.missing_bytes:
                    break
                out.append(self._next(self._intake.take()))
        except NbdProtocolError as error:
            self._next = None
            error.unsent = b"".join(out)
            raise
        self.unread = bytes(rest) if self.session else b""
        return b"".join(out)

    # --- what comes ---

    def _client_flags(self, raw: bytes) -> bytes:
        (flags,) = CLIENT_FLAGS.unpack(raw)
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            raise NbdProtocolError(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & NBD_FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        self._expect_option()
        return b""

    def _expect_option(self) -> None:
        self._intake.expect(OPTION.size)
        self._next = self._option_head

    def _option_head(self, raw: bytes) -> bytes:
        magic, self._option, length = OPTION.unpack(raw)
        if magic != IHAVEOPT:
            raise NbdProtocolError(f"no option where one must be (magic {magic:#x})")
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise NbdProtocolError(f"more than {MAX_OPTIONS} options")
        if self._option == NBD_OPT_EXPORT_NAME:
            if length > MAX_STRING_BYTES:  # this option knows no error reply
                raise NbdProtocolError(f"an export name of {length} bytes")
        elif not self._fixed:
            raise NbdProtocolError(f"option {self._option} without fixed newstyle")
        if length > MAX_SKIPPED_BYTES:
            raise NbdProtocolError(f"an option of {length} bytes")
        self._option_fault = self._fault_of_option(length)
        self._intake.expect(length, keep=self._option_fault is None)
        self._next = self._option_data
        return b""

    def _fault_of_option(self, length: int) -> OptionFault | None:
        """What can be said without the option's data, which is then not kept."""
        if self._option == NBD_OPT_ABORT:
            return None if length <= MAX_OPTION_BYTES else OptionFault(NBD_REP_ACK, "")
        if self._option in _NO_DATA and length:
            return OptionFault(NBD_REP_ERR_INVALID, "this option has no data")
        if self._option not in self._answers:
            return OptionFault(NBD_REP_ERR_UNSUP, "this option is not supported")
        if length > MAX_OPTION_BYTES:
            return OptionFault(NBD_REP_ERR_TOO_BIG, f"more than {MAX_OPTION_BYTES} bytes")
        return None

    def _option_data(self, data: bytes) -> bytes:
        self._expect_option()
        fault = self._option_fault
        try:
            if fault:
                raise fault
            if self.shutting_down and self._option not in (NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME):
                raise OptionFault(NBD_REP_ERR_SHUTDOWN, "the server is shutting down")
            return self._answers[self._option](data)
        except OptionFault as error:
            if self._option == NBD_OPT_EXPORT_NAME:
                raise NbdProtocolError(f"an export that cannot be served: {error}") from None
            return self._reply(error.reply_type, error.message.encode())

# SPDX-License-Identifier: Apache-2.0
"""The client's side of the handshake (proto.md, Newstyle and Fixed newstyle negotiation)."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NoReturn

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    CLISERV_MAGIC,
    IHAVEOPT,
    INIT_PASSWD,
    MAX_ANSWERS_BYTES,
    MAX_OPTION_REPLY_BYTES,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_NO_ZEROES,
    NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
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
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_UNSUP,
    NBD_REP_FLAG_ERROR,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_SERVER,
    OPTION_NAMES,
    REP_MAGIC,
    ZEROES_BYTES,
    Bytes,
    string_fault,
)
from vmapipe.protocol.nbd.errors import NbdProtocolError, NbdRefusedError
from vmapipe.protocol.nbd.handshake import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION_REPLY,
    U16,
    U32,
    Handshake,
    InfoQuery,
    MetaQuery,
    OptionFault,
    encode_info_query,
    encode_meta_query,
    encode_option,
    parse_string,
)
from vmapipe.protocol.nbd.session import (
    DEFAULT_BLOCK_SIZES,
    BlockSizes,
    Export,
    ListedExport,
    MetaContext,
    NbdSession,
    block_sizes_fault,
    known_flags,
    size_fault,
)


class ExportInfo:
    """Gathers what NBD_REP_INFO replies, or the answer to NBD_OPT_EXPORT_NAME, say of one export."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._description = ""
        self._block_sizes = DEFAULT_BLOCK_SIZES
        self._export: tuple[int, int] | None = None

    def set_export(self, size_bytes: int, flags: int) -> None:
        """Raises NbdProtocolError."""
        fault = size_fault(size_bytes)
        if fault:
            raise NbdProtocolError(fault)
        if not flags & NBD_FLAG_HAS_FLAGS:
            raise NbdProtocolError("transmission flags without NBD_FLAG_HAS_FLAGS")
        self._export = size_bytes, flags

    def take(self, data: bytes) -> None:
        """The data of one NBD_REP_INFO; unknown kinds are ignored. Raises NbdProtocolError."""
        (kind,) = _unpack(U16, data[: U16.size])
        if kind == NBD_INFO_EXPORT:
            _, size_bytes, flags = _unpack(INFO_EXPORT, data)
            self.set_export(size_bytes, flags)
        elif kind == NBD_INFO_NAME:
            self._name = _string(data[U16.size :])
        elif kind == NBD_INFO_DESCRIPTION:
            self._description = _string(data[U16.size :])
        elif kind == NBD_INFO_BLOCK_SIZE:
            _, minimum, preferred, maximum = _unpack(INFO_BLOCK_SIZE, data)
            self._block_sizes = BlockSizes(minimum, preferred, maximum)
            fault = block_sizes_fault(self._block_sizes)
            if fault:
                raise NbdProtocolError(fault)

    def build(self, *, structured: bool) -> Export:
        """Raises NbdProtocolError when the server has not said the export's size."""
        if self._export is None:
            raise NbdProtocolError("an acknowledgement without NBD_INFO_EXPORT")
        size_bytes, flags = self._export
        if not structured:
            flags &= ~NBD_FLAG_SEND_DF
        return Export(
            self._name, size_bytes, known_flags(flags), self._description, self._block_sizes
        )


def parse_listed(data: bytes) -> ListedExport:
    """The data of NBD_REP_SERVER. Raises NbdProtocolError."""
    (length,) = _unpack(U32, data[: U32.size])
    end = U32.size + length
    if end > len(data):
        raise NbdProtocolError("an export's name is longer than the reply")
    return ListedExport(_string(data[U32.size : end]), _string(data[end:]))


def parse_context(data: bytes) -> MetaContext:
    """The data of NBD_REP_META_CONTEXT. Raises NbdProtocolError."""
    (number,) = _unpack(U32, data[: U32.size])
    return MetaContext(number, _string(data[U32.size :]))


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise NbdProtocolError(f"{len(data)} bytes in an option reply, where {layout.size} belong")
    return layout.unpack(data)


def _string(raw: bytes) -> str:
    try:
        return parse_string(raw)
    except OptionFault as fault:
        raise NbdProtocolError(fault.message) from None


def _unencrypted() -> NbdProtocolError:
    """Somebody on the way may have put it there, to be believed as if it had been encrypted."""
    return NbdProtocolError("data without TLS behind the answer to NBD_OPT_STARTTLS")


_WANTED_INFOS = (NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE)
_META_OPTIONS = frozenset({NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT})
# Without these one can do: the client goes on.
_OPTIONAL = frozenset({NBD_OPT_STRUCTURED_REPLY, *_META_OPTIONS})
# After these it cannot.
_FINAL = frozenset({NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD})


class Goal(enum.Enum):
    """The purpose of a connection."""

    TRANSMISSION = NBD_OPT_GO
    #: Learn about one export, and leave.
    INFORMATION = NBD_OPT_INFO
    #: Learn which exports there are, and leave.
    LIST = NBD_OPT_LIST


class NbdClientHandshake(Handshake):
    """While `wanted_bytes`, feed what comes and send what `feed` returns.

    Then, according to the goal: `session` is there and the transmission phase
    has begun (NBD_OPT_GO, or NBD_OPT_EXPORT_NAME with servers that do not know
    it); or `export` and `offered_contexts`; or `listed`. In the latter two
    cases the connection is to be closed.

    `structured`: ask for structured replies; `contexts`: with them, for these metadata
    contexts. A server may have none of it: see the session.

    `tls`: ask for TLS first, and nothing without it. When `wants_tls`, encrypt the connection
    and send what `secured` returns.
    """

    def __init__(
        self,
        name: str = "",
        *,
        goal: Goal = Goal.TRANSMISSION,
        structured: bool = True,
        contexts: Sequence[str] = (BASE_ALLOCATION,),
        tls: bool = False,
    ) -> None:
        for text in (name, *contexts):
            fault = string_fault(text)
            if fault:
                raise LocalProtocolError(fault)
        super().__init__(GREETING.size, self._take_greeting)
        self.export: Export | None = None
        self.listed: list[ListedExport] = []
        self.offered_contexts: tuple[str, ...] = ()
        self._name = name
        self._goal = goal
        self._ask_structured = structured and goal is not Goal.LIST
        self._wanted_contexts = tuple(contexts)
        self._ask_tls = tls
        #: The server is ready for TLS: nothing more may be sent or received without it.
        self.wants_tls = False
        self._structured = self._fixed = self._no_zeroes = False
        self._contexts: list[MetaContext] = []
        self._info = ExportInfo(name)
        self._option = 0
        self._reply_type = 0
        self._answers_bytes = 0

    def eof(self) -> NoReturn:
        """The server has closed the connection while `wanted_bytes`: raises what that means."""
        self._next = None
        if self._option == NBD_OPT_EXPORT_NAME:
            raise NbdRefusedError(NBD_OPT_EXPORT_NAME, None, "it may have no export of that name")
        raise NbdProtocolError("the server closed the connection during the handshake")

    def secured(self) -> bytes:
        """The connection is encrypted now; return what to send next."""
        if not self.wants_tls:
            raise LocalProtocolError("TLS that was not agreed on")
        self.wants_tls = False
        return self._first_question()

    def feed(self, data: Bytes) -> bytes:
        out = super().feed(data)
        if self._is_followed:
            raise _unencrypted()
        return out

    @property
    def _is_followed(self) -> bool:
        """Whether more has come behind the answer to NBD_OPT_STARTTLS."""
        return self.wants_tls and self._intake.missing_bytes != OPTION_REPLY.size

    # --- what the server sends ---

    def _take_greeting(self, raw: bytes) -> bytes:
        password, magic, flags = GREETING.unpack(raw)
        if password == INIT_PASSWD and magic == CLISERV_MAGIC:
            raise NbdProtocolError("the server speaks the oldstyle protocol of before 2011")
        if (password, magic) != (INIT_PASSWD, IHAVEOPT):
            raise NbdProtocolError("this is not an NBD server")
        self._fixed = bool(flags & NBD_FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & NBD_FLAG_NO_ZEROES)
        answer = NBD_FLAG_C_FIXED_NEWSTYLE if self._fixed else 0
        answer |= NBD_FLAG_C_NO_ZEROES if self._no_zeroes else 0
        return CLIENT_FLAGS.pack(answer) + self._first_option()

    def _take_reply(self, raw: bytes) -> bytes:
        """An answer's header. The limits are checked here, before its data comes."""
        if self.wants_tls:
            raise _unencrypted()
        magic, option, self._reply_type, length = OPTION_REPLY.unpack(raw)
        if magic != REP_MAGIC:
            raise NbdProtocolError(f"no option reply where one must be (magic {magic:#x})")
        if option != self._option:
            raise NbdProtocolError(f"an answer to option {option}, not to {self._option}")
        if length > MAX_OPTION_REPLY_BYTES:
            raise NbdProtocolError(f"an option reply of {length} bytes")
        self._answers_bytes += OPTION_REPLY.size + length
        if self._answers_bytes > MAX_ANSWERS_BYTES:
            raise NbdProtocolError(f"more than {MAX_ANSWERS_BYTES} bytes of option replies")
        self._intake.expect(length)
        self._next = self._take_reply_data
        return b""

    def _take_reply_data(self, data: bytes) -> bytes:
        self._intake.expect(OPTION_REPLY.size)
        self._next = self._take_reply
        match self._option, self._reply_type:
            case _, kind if kind & NBD_REP_FLAG_ERROR:
                return self._failed(kind, data.decode(errors="replace"))
            case _, kind if kind == NBD_REP_ACK:
                if data:
                    raise NbdProtocolError("an acknowledgement with data")
                return self._acknowledged()
            case option, kind if option == NBD_OPT_LIST and kind == NBD_REP_SERVER:
                self.listed.append(parse_listed(data))
            case option, kind if option in _META_OPTIONS and kind == NBD_REP_META_CONTEXT:
                self._contexts.append(parse_context(data))
            case option, kind if option == self._goal.value and kind == NBD_REP_INFO:
                self._info.take(data)
            case _, kind:
                raise NbdProtocolError(f"{self._option_name()} is answered by reply type {kind}")
        return b""

    def _take_export(self, raw: bytes) -> bytes:
        size_bytes, flags = EXPORT_NAME_REPLY.unpack_from(raw)
        self._info.set_export(size_bytes, flags)
        return self._enter()

    # --- what follows ---

    def _first_option(self) -> bytes:
        if not self._fixed:
            if self._goal is not Goal.TRANSMISSION:
                raise NbdRefusedError(self._goal.value, NBD_REP_ERR_UNSUP)
            if self._ask_tls:
                raise NbdRefusedError(NBD_OPT_STARTTLS, NBD_REP_ERR_UNSUP)
            return self._ask_export_name()
        if self._ask_tls:
            return self._ask(NBD_OPT_STARTTLS)
        return self._first_question()

    def _first_question(self) -> bytes:
        if self._ask_structured:
            return self._ask(NBD_OPT_STRUCTURED_REPLY)
        return self._ask_goal()

    def _acknowledged(self) -> bytes:
        if self._option == NBD_OPT_STARTTLS:
            self.wants_tls = True
            return b""
        if self._option == NBD_OPT_STRUCTURED_REPLY:
            self._structured = True
            return self._ask_contexts() if self._wanted_contexts else self._ask_goal()
        if self._option in _META_OPTIONS:
            self._check_contexts()
            return self._ask_goal()
        if self._option == NBD_OPT_GO:
            return self._enter()
        if self._option == NBD_OPT_INFO:
            self.export = self._info.build(structured=self._structured)
        return self._leave()

    def _failed(self, reply_type: int, message: str) -> bytes:
        if reply_type not in _FINAL:
            if self._option in _OPTIONAL:
                self._contexts.clear()  # "the client MUST disregard any context replies"
                return self._ask_goal()
            if self._option == NBD_OPT_GO and reply_type == NBD_REP_ERR_UNSUP:
                return self._ask_export_name()
        raise NbdRefusedError(self._option, reply_type, message, unsent=self._leave())

    def _check_contexts(self) -> None:
        names = [context.name for context in self._contexts]
        if self._option == NBD_OPT_LIST_META_CONTEXT:
            self.offered_contexts = tuple(names)
        elif len(set(names)) < len(names) or not set(names) <= set(self._wanted_contexts):
            raise NbdProtocolError("metadata contexts that were not asked for")

    def _enter(self) -> bytes:
        """The transmission phase begins."""
        self.export = self._info.build(structured=self._structured)
        self._next = None
        self.session = NbdSession(
            self.export, self.export.flags, self._structured, self._no_zeroes, (*self._contexts,)
        )
        return b""

    # --- what the client sends ---

    def _ask(self, option: int, data: bytes = b"") -> bytes:
        self._option = option
        self._intake.expect(OPTION_REPLY.size)
        self._next = self._take_reply
        return encode_option(option, data)

    def _ask_contexts(self) -> bytes:
        if self._goal is Goal.INFORMATION:
            return self._ask(
                NBD_OPT_LIST_META_CONTEXT, encode_meta_query(MetaQuery(self._name, ()))
            )
        query = MetaQuery(self._name, self._wanted_contexts)
        return self._ask(NBD_OPT_SET_META_CONTEXT, encode_meta_query(query))

    def _ask_goal(self) -> bytes:
        if self._goal is Goal.LIST:
            return self._ask(NBD_OPT_LIST)
        return self._ask(self._goal.value, encode_info_query(InfoQuery(self._name, _WANTED_INFOS)))

    def _ask_export_name(self) -> bytes:
        self._option = NBD_OPT_EXPORT_NAME
        zeroes_bytes = 0 if self._no_zeroes else ZEROES_BYTES
        self._intake.expect(EXPORT_NAME_REPLY.size + zeroes_bytes)
        self._next = self._take_export
        return encode_option(NBD_OPT_EXPORT_NAME, self._name.encode())

    def _leave(self) -> bytes:
        """Soft disconnect. The answer need not be waited for."""
        self._next = None
        return encode_option(NBD_OPT_ABORT)

    def _option_name(self) -> str:
        return OPTION_NAMES.get(self._option, str(self._option))

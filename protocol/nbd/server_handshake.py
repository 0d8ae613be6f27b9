# SPDX-License-Identifier: Apache-2.0
"""The server's side of the handshake (proto.md, Newstyle and Fixed newstyle negotiation)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from vmapipe.protocol.errors import LocalProtocolError
from vmapipe.protocol.nbd.constants import (
    BASE_ALLOCATION,
    IHAVEOPT,
    INIT_PASSWD,
    MAX_LIST_BYTES,
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_SKIPPED_BYTES,
    MAX_STRING_BYTES,
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
)
from vmapipe.protocol.nbd.errors import NbdProtocolError
from vmapipe.protocol.nbd.handshake import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    OPTION,
    U32,
    Handshake,
    OptionFault,
    encode_infos,
    encode_option_reply,
    encode_server_entry,
    parse_info_query,
    parse_meta_query,
    parse_string,
)
from vmapipe.protocol.nbd.session import Export, MetaContext, NbdSession

# Any number will do; not 0, which LIST_META_CONTEXT gives for "none".
_ALLOCATION_ID = 1
_WILDCARD = "base:"


class ServerOptions:
    """One connection's options. `session` is there when the client has chosen an export."""

    def __init__(self, exports: Iterable[Export], *, structured: bool, listable: bool) -> None:
        self.session: NbdSession | None = None
        #: NBD_FLAG_C_NO_ZEROES was agreed on.
        self.no_zeroes = False
        self._all = tuple(exports)
        self._by_name = {export.name: export for export in self._all}
        if len(self._by_name) != len(self._all):
            raise LocalProtocolError("two exports have the same name")
        if len(self._all) == 1:
            self._by_name.setdefault("", self._all[0])
        self._listable = listable
        self._listed_bytes = 0
        self._structured = False
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_of = ""
        self._answers: dict[int, Callable[[bytes], bytes]] = {
            NBD_OPT_EXPORT_NAME: self._export_name,
            NBD_OPT_LIST: self._list,
            NBD_OPT_INFO: self._info,
            NBD_OPT_GO: self._go,
        }
        if structured:
            self._answers |= {
                NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
                NBD_OPT_LIST_META_CONTEXT: self._list_meta_context,
                NBD_OPT_SET_META_CONTEXT: self._set_meta_context,
            }

    @property
    def known(self) -> Collection[int]:
        """The options that `answer` takes."""
        return self._answers.keys()

    def begin(self, option: int) -> None:
        """An option is coming; it may still turn out to be refused."""
        # "replaces all previously-set metadata contexts (including when this command fails)"
        if option == NBD_OPT_SET_META_CONTEXT:
            self._contexts = ()

    def answer(self, option: int, data: bytes) -> bytes:
        """All replies to the option. Raises OptionFault."""
        return self._answers[option](data)

    def _export_name(self, data: bytes) -> bytes:
        session = self._choose(parse_string(data))
        zeroes = b"" if self.no_zeroes else bytes(ZEROES_BYTES)
        self.session = session
        return EXPORT_NAME_REPLY.pack(session.export.size_bytes, session.flags) + zeroes

    def _list(self, _: bytes) -> bytes:
        if not self._listable:
            raise OptionFault(NBD_REP_ERR_POLICY, "the exports are not listed")
        answer = b"".join(
            encode_option_reply(
                NBD_OPT_LIST, NBD_REP_SERVER, encode_server_entry(export.name, export.description)
            )
            for export in self._all
        )
        self._listed_bytes += len(answer)
        if self._listed_bytes > MAX_LIST_BYTES:
            raise OptionFault(NBD_REP_ERR_TOO_BIG, "the list is too long")
        return answer + encode_option_reply(NBD_OPT_LIST, NBD_REP_ACK)

    def _info(self, data: bytes) -> bytes:
        return self._describe(NBD_OPT_INFO, data)[0]

    def _go(self, data: bytes) -> bytes:
        answer, self.session = self._describe(NBD_OPT_GO, data)
        return answer

    def _describe(self, option: int, data: bytes) -> tuple[bytes, NbdSession]:
        query = parse_info_query(data)
        session = self._choose(query.name)
        export = session.export
        texts = {NBD_INFO_NAME: export.name}
        if export.description:
            texts[NBD_INFO_DESCRIPTION] = export.description
        infos = encode_infos(
            export.size_bytes,
            session.flags,
            {kind: text for kind, text in texts.items() if kind in query.wanted},
            export.block_sizes if NBD_INFO_BLOCK_SIZE in query.wanted else None,
        )
        replies = [encode_option_reply(option, NBD_REP_INFO, info) for info in infos]
        return b"".join(replies) + encode_option_reply(option, NBD_REP_ACK), session

    def _structured_reply(self, _: bytes) -> bytes:
        self._structured = True
        return encode_option_reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK)

    def _list_meta_context(self, data: bytes) -> bytes:
        query = parse_meta_query(data)
        names = [BASE_ALLOCATION] if self._has_allocation(query.name) else []
        asked = not query.queries or {_WILDCARD, BASE_ALLOCATION} & {*query.queries}
        # The id has no meaning in a list: it "SHOULD be set to zero".
        contexts = [MetaContext(0, name) for name in names if asked]
        return _context_replies(NBD_OPT_LIST_META_CONTEXT, contexts)

    def _set_meta_context(self, data: bytes) -> bytes:
        query = parse_meta_query(data)
        if self._has_allocation(query.name) and BASE_ALLOCATION in query.queries:
            self._contexts = (MetaContext(_ALLOCATION_ID, BASE_ALLOCATION),)
        self._contexts_of = query.name
        return _context_replies(NBD_OPT_SET_META_CONTEXT, self._contexts)

    def _has_allocation(self, name: str) -> bool:
        if not self._structured:
            raise OptionFault(NBD_REP_ERR_INVALID, "structured replies come first")
        return self._find(name).allocation

    def _find(self, name: str) -> Export:
        export = self._by_name.get(name)
        if export is None:
            raise OptionFault(NBD_REP_ERR_UNKNOWN, "no export has this name")
        return export

    def _choose(self, name: str) -> NbdSession:
        """Return the session that the transmission phase would have with this export. Raises OptionFault."""
        export = self._find(name)
        flags = export.flags if self._structured else export.flags & ~NBD_FLAG_SEND_DF
        # Contexts are selected for an export, by its name as the client gave it.
        contexts = self._contexts if name == self._contexts_of else ()
        return NbdSession(export, flags, self._structured, self.no_zeroes, contexts)


def _context_replies(option: int, contexts: Iterable[MetaContext]) -> bytes:
    replies = [
        encode_option_reply(option, NBD_REP_META_CONTEXT, U32.pack(ctx.id) + ctx.name.encode())
        for ctx in contexts
    ]
    return b"".join(replies) + encode_option_reply(option, NBD_REP_ACK)


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

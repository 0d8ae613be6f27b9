# SPDX-License-Identifier: Apache-2.0
"""The engine "vm" of `vmapipe files`: a small virtual machine whose kernel mounts the file systems.

It has a kernel of this host, our own interpreter with inside/volumes.py as its only process, the
archive's disks (what its kernel replays goes into a nameless file), one port, no network. What it says is
a stranger's word, as the parser's is: whoever made the file system may have taken its kernel over.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

from vmapipe.access.disk import ArchiveDisk
from vmapipe.access.files.appliance_image import NEEDED_MODULES, PYTHON, START, make_initramfs
from vmapipe.access.files.messages import (
    MAX_MESSAGE_BYTES,
    FromAsker,
    FromParser,
    Key,
    ParserReady,
    Read,
    decode_for_asker,
    encode,
)
from vmapipe.access.files.session import EngineEnded, FileReader
from vmapipe.access.machine.accelerator import KVM, TCG, accelerator
from vmapipe.access.machine.kernels import Kernel, find_kernel
from vmapipe.access.machine.process import MachineEnded, OwnQemu, find_qemu, quoted
from vmapipe.access.serve import read_only_offer
from vmapipe.control.qmp.connection import Command, QmpGone, QmpRefused
from vmapipe.producer.nbd.server import DRAIN_S, Server
from vmapipe.protocol.errors import RemoteProtocolError
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure
from vmapipe.runtime.folders import OwnFolder
from vmapipe.runtime.logs import Trace
from vmapipe.runtime.text import one_line

_log = Trace(__name__)

# To the guest's first word: 4 s emulated, 1 s with KVM, on machines that have nothing else to do.
_START_S = {TCG: 180.0, KVM: 30.0}
# A key is derived, or a large log replayed, without a word meanwhile. 300 s is what the key of a
# LUKS2 volume that was made for a quick processor takes on an emulated one.
_SILENCE_S = 300.0
# The kernel, 40 MiB of files, and what it keeps of a file system whose log it replays.
_MEMORY_MIB = 512
# What LUKS2 needs beside it to derive a key: 1 GiB, if it was made with cryptsetup's defaults.
_KEY_MEMORY_MIB = 1200
# What the kernel may change on all disks: twice the largest log of XFS. A kernel that a file system
# has taken over could fill the host's disk otherwise.
_CHANGES_BYTES = 4 << 30
# Of the kernel's console, the latest: a power of two.
_CONSOLE = "64K"
# PCI: eight functions on each of the places that q35 leaves free behind our other devices.
_FIRST_SLOT, _LAST_SLOT, _FUNCTIONS = 8, 30, 8
MAX_DISKS = (_LAST_SLOT - _FIRST_SLOT + 1) * _FUNCTIONS


class Frames:
    """Cuts a stream into messages, each behind its length. Pure."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[FromParser]:
        """Raises RemoteProtocolError; then it is not used any more."""
        self._held += data
        at = 0
        while len(self._held) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, at)
            if length > MAX_MESSAGE_BYTES:
                raise RemoteProtocolError("too-large", f"a message of {length} bytes")
            end = at + _LENGTH.size + length
            if len(self._held) < end:
                break
            message = decode_for_asker([bytes(self._held[at + _LENGTH.size : end])])
            at = end
            yield message
        del self._held[:at]


_LENGTH = struct.Struct(">I")


def check_host(folder: str | None) -> Kernel:
    """Return the kernel that would be booted. Raises Failure: what this host lacks."""
    find_qemu()
    return find_kernel(folder, NEEDED_MODULES)


class Appliance(FileReader):
    """One virtual machine for all disks of an archive. Use as a context: it is ended at the end."""

    def __init__(
        self,
        disks: Sequence[tuple[str, ArchiveDisk]],
        cancel: Cancel,
        keys: Sequence[Key] = (),
        folder: str | None = None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Boots it. `folder`: where a kernel and its modules are, in place of this host's own.

        `notice` is told of damage in the archive. Raises Failure: what is missing; Cancelled.
        """
        self.names = [name for name, _ in disks]
        self._disks = [disk for _, disk in disks]
        self._cancel = cancel
        self._keys = keys
        if len(disks) > MAX_DISKS:
            raise Failure(
                f"the appliance takes {MAX_DISKS} disks, and this archive has {len(disks)}"
            )
        self._kernel = check_host(folder)
        self._initramfs = make_initramfs(self._kernel, len(disks), has_keys=bool(keys))
        self._stack = contextlib.ExitStack()
        try:
            self._boot(notice)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        self._stack.close()

    # --- start ---

    def _boot(self, notice: Callable[[str], None]) -> None:
        """With KVM if that runs a guest here; if it does not come up with it, without."""
        name = accelerator(self._cancel)
        try:
            self._start(name, notice)
        except EngineEnded:
            if name != KVM:
                raise
            self._stack.close()
            self._start(TCG, notice)

    def _start(self, accelerator_name: str, notice: Callable[[str], None]) -> None:
        folder = self._stack.enter_context(OwnFolder("appliance"))
        address = os.path.join(folder.path, "nbd")
        self._serve_disks(address, notice)
        initramfs = os.path.join(folder.path, "initramfs")
        with open(initramfs, "wb") as file:
            file.write(self._initramfs.finish())
        self._sock, theirs = socket.socketpair()
        self._stack.callback(self._sock.close)
        self._frames = Frames()
        self._waiting: Iterator[FromParser] = iter(())
        with theirs:
            self._machine = self._stack.enter_context(
                OwnQemu(
                    "the appliance",
                    folder,
                    self._words(accelerator_name, address, initramfs, theirs.fileno()),
                    self._cancel,
                    pass_fds=[theirs.fileno()],
                    environment={**os.environ, "TMPDIR": folder.path},
                    file_limit_bytes=_CHANGES_BYTES,
                )
            )
        # It has all open: if we are killed from now on, nothing is left.
        folder.clear()
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        for fd in (self._sock.fileno(), self._cancel.fd, self._machine.fd, self._machine.qmp.fd):
            self._selector.register(fd, selectors.EVENT_READ)
        first = self._hear(_START_S[accelerator_name])
        if not isinstance(first, ParserReady):
            raise self._error("it does not begin as it should")
        for key in self._keys:
            self._tell(key)

    def _serve_disks(self, address: str, notice: Callable[[str], None]) -> None:
        # Nobody else can enter its folder.
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen()
        offers = [
            read_only_offer(f"disk{number}", disk, self.names[number])
            for number, disk in enumerate(self._disks)
        ]
        server = Server([listener], offers, notice, reports_failures=True)

        def stop() -> None:
            server.close_intake()
            server.finish(time.monotonic() + DRAIN_S)

        self._stack.callback(stop)
        server.start()

    def _words(
        self, accelerator_name: str, address: str, initramfs: str, port_fd: int
    ) -> list[str]:
        memory = _MEMORY_MIB + (_KEY_MEMORY_MIB if self._keys else 0)
        words = [
            *("-machine", "q35", "-accel", accelerator_name, "-m", str(memory)),
            *("-cpu", "host" if accelerator_name == KVM else "max"),
            # A guest that has ended leaves its last words on the console.
            *("-action", "reboot=shutdown,shutdown=pause"),
            *("-chardev", f"ringbuf,id=console,size={_CONSOLE}", "-serial", "chardev:console"),
            *("-kernel", self._kernel.image, "-initrd", initramfs, "-append", self._append()),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=files,fd={port_fd}"),
            *("-device", "virtserialport,chardev=files,name=files"),
        ]
        for number in range(len(self._disks)):
            slot, function = divmod(number, _FUNCTIONS)
            words += [
                "-drive",
                f"if=none,id=disk{number},format=raw,snapshot=on,file.driver=nbd,"
                f"file.server.type=unix,file.server.path={quoted(address)},file.export=disk{number}",
                "-device",
                # By itself QEMU would stop the machine where the host's disk is full.
                f"virtio-blk-pci,drive=disk{number},serial=disk{number},werror=report,rerror=report,"
                f"addr={_FIRST_SLOT + slot:#x}.{function},multifunction=on",
            ]
        return words

    def _append(self) -> str:
        folders = ":".join(self._initramfs.library_folders)
        return (
            "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable "
            f"no_timer_check random.trust_cpu=on rdinit={PYTHON} LD_LIBRARY_PATH={folders} "
            f"-- -EsSB {START}"
        )

    # --- words ---

    def _tell(self, message: FromAsker) -> None:
        raw = bytes(encode(message))
        try:
            self._sock.sendall(_LENGTH.pack(len(raw)) + raw)
        except OSError:
            raise self._error("") from None

    def _hear(self, limit_s: float = _SILENCE_S) -> FromParser:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                message = next(self._waiting, None)
            except RemoteProtocolError as error:
                raise self._error(f"it does not speak as it should ({error})") from error
            if message is not None:
                return message
            self._take(deadline, limit_s)

    def _serve(self, request: Read | ParserReady) -> None:
        raise self._error("it says what it must not")

    def _take(self, deadline: float, limit_s: float) -> None:
        """Wait for more bytes. Raises EngineEnded, Cancelled."""
        ready = {key.fd for key, _ in self._selector.select(max(0.0, deadline - time.monotonic()))}
        self._cancel.check()
        if self._sock.fileno() in ready:
            data = b""
            with contextlib.suppress(OSError):
                data = self._sock.recv(_RECEIVE_BYTES)
            if not data:
                raise self._error("")
            self._waiting = self._frames.feed(data)
        elif self._machine.fd in ready or self._has_stopped(self._machine.qmp.fd in ready):
            raise self._error("")
        elif time.monotonic() >= deadline:
            raise self._error(f"it has been silent for {limit_s:.0f} s")

    def _has_stopped(self, is_told: bool) -> bool:
        """Whether the guest's kernel has given up, by QEMU's events."""
        if not is_told:
            return False
        try:
            return any(event["event"] == "SHUTDOWN" for event in self._machine.qmp.events())
        except QmpGone:
            return True

    def _error(self, what: str) -> EngineEnded:
        """`what` it did, or if that is empty: how it has ended."""
        if not what:
            what = self._last_words()
        return EngineEnded(f"the appliance for {', '.join(self.names)} failed: {what}")

    def _last_words(self) -> str:
        """What its kernel said last, or how QEMU has ended."""
        ask = Command("ringbuf-read", {"device": "console", "size": 65536, "format": "utf8"})
        try:
            said = self._machine.qmp.execute(ask)
        except (QmpGone, QmpRefused, MachineEnded):
            return str(self._machine.ended()).partition(": ")[2]
        lines = [line.strip() for line in str(said).splitlines() if line.strip()]
        telling = [line for line in lines if "Kernel panic" in line or "BUG:" in line]
        _log.debug("the appliance's console: %s", lines)
        return f"its kernel said: {one_line((telling or lines or ['nothing'])[-1], 300)}"


_RECEIVE_BYTES = 1 << 18

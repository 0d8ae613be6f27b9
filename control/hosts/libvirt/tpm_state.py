# SPDX-License-Identifier: Apache-2.0
"""The state of a restored domain's TPM, where libvirt's swtpm will look for it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from typing import NamedTuple

from vmapipe.control.hosts.libvirt.host_facts import QemuUser
from vmapipe.control.qemu.tpm import VOLUME_BYTES, states_of
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder, made_path

_SYSTEM = "/var/lib/libvirt/swtpm"
_SETTINGS = "/etc/libvirt/qemu.conf"
_SETTING = re.compile(r'^\s*swtpm_user\s*=\s*"([^"]{1,64})"', re.MULTILINE)
# Distributions give swtpm the user of other TPM software.
_USUAL_USERS = ("tss", "swtpm")
# What swtpm has in a domain's folder.
_STATE_FILE = re.compile(r"tpm2?-00\.(?:permall|volatilestate|savestate)|\.lock")
_MOST_SETTINGS_BYTES = 1 << 20


class TpmFolder(NamedTuple):
    """The folder that has one folder a domain, and the user that swtpm runs as; None: ours."""

    path: str
    user: QemuUser | None


def tpm_folder(uri: str, daemon: QemuUser | None) -> TpmFolder | None:
    """Return where this libvirt keeps TPMs' states; None: where we cannot write.

    `daemon`: the user of a user's own ("session") daemon.
    """
    if uri.partition("?")[0].endswith("/system"):
        return TpmFolder(_SYSTEM, _system_user()) if os.geteuid() == 0 else None
    if daemon is not None and os.geteuid() not in (0, daemon.uid):
        return None
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    place = os.path.join(base, "libvirt", "qemu")
    # Another user's, whose settings are elsewhere.
    if daemon is not None and daemon.uid != os.geteuid() and not _belongs(place, daemon):
        return None
    return TpmFolder(os.path.join(place, "swtpm"), daemon)


def _belongs(path: str, user: QemuUser) -> bool:
    try:
        return os.stat(path).st_uid == user.uid
    except OSError:
        return False


def _system_user() -> QemuUser | None:
    try:
        with open(_SETTINGS, "rb") as file:
            text = file.read(_MOST_SETTINGS_BYTES).decode("utf-8", "replace")
    except OSError:
        text = ""
    match = _SETTING.search(text)
    for name in (match[1],) if match else _USUAL_USERS:
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return QemuUser(found.pw_uid, found.pw_gid)
    return None


def read_state(path: str) -> bytes:
    """Return the state that is kept for good in a restored volume. Raises Failure."""
    try:
        with open(path, "rb") as file:
            volume = file.read(VOLUME_BYTES)
    except OSError as error:
        raise Failure(f"its state cannot be read: {os_error_text(error)}") from error
    state = states_of(volume).get("permall", b"")
    if not state:
        raise Failure("the archive's volume for it has no state")
    return state


def put_state(folder: TpmFolder, domain_uuid: str, version: str, state: bytes) -> None:
    """Put a state where a domain's swtpm looks for it, instead of any that is there. Raises Failure."""
    is_second = version == "2.0"
    name = "tpm2-00.permall" if is_second else "tpm-00.permall"
    try:
        # Step by step and never through a link: it may be another user's folder.
        with contextlib.ExitStack() as stack:
            place, last = os.path.split(folder.path)
            above = stack.enter_context(made_path(place))
            # The system's is root's, for each swtpm to pass.
            owner = None if folder.path == _SYSTEM else folder.user
            base = stack.enter_context(_inside(above, last, owner, 0o711))
            own = stack.enter_context(_inside(base, domain_uuid, folder.user, 0o711))
            held = stack.enter_context(
                _inside(own, "tpm2" if is_second else "tpm1.2", folder.user, 0o700)
            )
            for old in held.names():
                if _STATE_FILE.fullmatch(old):
                    os.unlink(old, dir_fd=held.fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(held.open(name, flags), "wb") as file:
                file.write(state)
                file.flush()
                os.fsync(file.fileno())
                _give(file.fileno(), folder.user)
            held.sync()
    except OSError as error:
        raise Failure(
            f"its state cannot be put below {folder.path}: {os_error_text(error)}"
        ) from error


def _inside(above: HeldFolder, name: str, user: QemuUser | None, mode: int) -> HeldFolder:
    """Open a folder in another one; make it if it is not there, for swtpm to pass. Raises OSError."""
    if above.status(name) is not None:
        return above.folder(name)
    held = above.make_folder(name, mode)
    os.fchmod(held.fd, mode)  # whatever the umask is
    _give(held.fd, user)
    return held


def _give(fd: int, user: QemuUser | None) -> None:
    if user is not None and os.geteuid() == 0:
        os.fchown(fd, user.uid, user.gid)

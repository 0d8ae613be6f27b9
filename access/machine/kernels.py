# SPDX-License-Identifier: Apache-2.0
"""A Linux kernel of this host, and modules of it in the order in which they need each other."""

from __future__ import annotations

import gzip
import lzma
import os
import platform
import re
from collections.abc import Iterator, Sequence

from vmapipe.restore.archive.zstd import decompress_start
from vmapipe.runtime.errors import Failure, os_error_text

#: Names a folder with a kernel and its modules, as a distribution's package has them.
VARIABLE = "VMAPIPE_APPLIANCE"
_PACKAGE = """\
apt-get download "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p')" && \
dpkg-deb -x linux-image-*.deb DIR, and --appliance DIR (or VMAPIPE_APPLIANCE=DIR)"""
# The largest module of a distribution, unpacked, has some 20 MiB.
_MAX_MODULE_BYTES = 128 << 20
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SUFFIXES = (".ko", ".ko.zst", ".ko.xz", ".ko.gz")


class Kernel:
    """A kernel's image, and its modules."""

    def __init__(self, image: str, version: str, folder: str) -> None:
        """`folder`: lib/modules/VERSION."""
        self.image = image
        self.version = version
        self._builtin: set[str] = set()
        self._files: dict[str, str] = {}
        self._data: dict[str, bytes] = {}
        try:
            with open(os.path.join(folder, "modules.builtin")) as file:
                self._builtin = {_module_name(line.strip()) for line in file}
        except OSError:
            pass  # without it a module that is built in counts as missing
        for place, _, names in os.walk(folder):
            for name in names:
                if name.endswith(_SUFFIXES):
                    self._files[_module_name(name)] = os.path.join(place, name)

    def has(self, name: str) -> bool:
        """Return whether it has a module of this name, built in or as a file."""
        return name in self._builtin or name in self._files

    def chain(self, names: Sequence[str]) -> list[str]:
        """Return the modules to load for `names`, each behind what it needs; built-in ones need none.

        One that the kernel does not have is left out. Raises Failure for a file that cannot be read.
        """
        order: list[str] = []
        for name in names:
            self._add(name, order, ())
        return order

    def _add(self, name: str, order: list[str], above: tuple[str, ...]) -> None:
        if name in order or name in above or name not in self._files:
            return
        found = _DEPENDS.search(self.module(name))
        needed = found[1].decode().split(",") if found and found[1] else []
        for other in needed:
            self._add(other.replace("-", "_"), order, (*above, name))
        order.append(name)

    def module(self, name: str) -> bytes:
        """Return the module's file, decompressed. Raises Failure."""
        if name not in self._data:
            path = self._files[name]
            try:
                with open(path, "rb") as file:
                    raw = file.read(_MAX_MODULE_BYTES)
                self._data[name] = _unpacked(path, raw)
            except OSError as error:
                raise Failure(f"cannot read {path}: {os_error_text(error)}") from error
            except (EOFError, lzma.LZMAError, ValueError) as error:
                raise Failure(f"cannot read {path}: {error}") from error
        return self._data[name]


def _module_name(path: str) -> str:
    """virtio-blk.ko.zst and virtio_blk are one module."""
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def _unpacked(path: str, raw: bytes) -> bytes:
    if path.endswith(".zst"):
        return decompress_start([raw], _MAX_MODULE_BYTES)
    if path.endswith(".xz"):
        return lzma.LZMADecompressor().decompress(raw, _MAX_MODULE_BYTES)
    if path.endswith(".gz"):
        return gzip.decompress(raw)
    return raw


def find_kernel(folder: str | None, needed: Sequence[str]) -> Kernel:
    """Return a kernel with the modules that are needed. Raises Failure: what is missing, and what to do.

    `folder`: where to look, in place of the host's own (or of VMAPIPE_APPLIANCE's).
    """
    if platform.machine() != "x86_64":
        raise Failure(f"it needs a host with x86_64, and this one has {platform.machine()}")
    folder = folder or os.environ.get(VARIABLE) or "/"
    unreadable, unfit = "", ""
    for image, version, modules in _candidates(folder):
        if not os.access(image, os.R_OK):
            unreadable = unreadable or image
            continue
        kernel = Kernel(image, version, modules)
        missing = [name for name in needed if not kernel.has(name)]
        if not missing:
            return kernel
        unfit = unfit or f"{image} has no {', '.join(missing)}"
    reason = unfit
    if unreadable:
        reason = f"only root can read {unreadable}"
    place = "here" if folder == "/" else f"in {folder}"
    raise Failure(
        f"there is no Linux kernel {place} that can be used{f' ({reason})' if reason else ''}; "
        f"Debian's needs no rights: {_PACKAGE}"
    )


def _candidates(folder: str) -> Iterator[tuple[str, str, str]]:
    """Kernels with folders of modules: small ones for clouds first, then the newest."""
    found = []
    for below in ("lib/modules", "usr/lib/modules"):
        place = os.path.join(folder, below)
        for version in _names(place):
            modules = os.path.join(place, version)
            for image in (
                os.path.join(folder, "boot", f"vmlinuz-{version}"),
                os.path.join(folder, f"vmlinuz-{version}"),
                os.path.join(modules, "vmlinuz"),
            ):
                if os.path.isfile(image):
                    found.append((image, version, modules))
                    break
    return iter(sorted(found, key=lambda item: _rank(item[1]), reverse=True))


def _rank(version: str) -> tuple[bool, list[int]]:
    return "cloud" in version, [int(number) for number in re.findall(r"\d+", version)]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

# SPDX-License-Identifier: Apache-2.0
"""From the words of the command line to the store and the configs of a job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vmapipe.archiver.compression import parse_compression
from vmapipe.archiver.device import Mark
from vmapipe.archiver.manifests import (
    ManifestFile,
    ManifestLines,
    ManifestObject,
    ManifestOutput,
    ManifestSink,
    beside,
)
from vmapipe.archiver.outputs.output import Output
from vmapipe.archiver.outputs.spec import is_stream, open_output
from vmapipe.archiver.store import Store
from vmapipe.runtime.arguments import split_named
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Failure, UsageError, os_error_text
from vmapipe.runtime.events import Emit
from vmapipe.runtime.objectstore import is_object
from vmapipe.runtime.side_files import read_awaited
from vmapipe.vma.errors import LimitError
from vmapipe.vma.header import Config
from vmapipe.vma.layout import MAX_BLOB_BYTES, MAX_CONFIGS

if TYPE_CHECKING:
    from vmapipe.archiver.digests import Digests


def read_configs(texts: Sequence[str], cancel: Cancel) -> tuple[Config, ...]:
    """`[NAME=]PATH` each. Raises Failure for what cannot be read or is too large."""
    if len(texts) > MAX_CONFIGS:
        raise UsageError(f"too many configs: {len(texts)}; the limit is {MAX_CONFIGS}")
    configs = []
    for text in texts:
        name, path = split_named(text)
        try:
            # One byte more than fits tells that it is too large, however large it is.
            data = read_awaited(path, MAX_BLOB_BYTES + 1, cancel)
        except OSError as error:
            raise Failure(f"unable to read file '{path}': {os_error_text(error)}") from error
        if len(data) > MAX_BLOB_BYTES:
            raise LimitError(
                f"config {name!r}: {path} has {os.path.getsize(path)} bytes; the limit is "
                f"{MAX_BLOB_BYTES}"
            )
        configs.append(Config(name, data))
    return tuple(configs)


def store_for(
    options: argparse.Namespace, wake: Callable[[], None], cancel: Cancel, emit: Emit
) -> Store[Mark]:
    """Open the output and what goes beside it. Raises Failure; nothing is then left."""
    compression = None
    if options.compress:
        compression = parse_compression(options.compress, options.threads)
    if options.manifest and options.no_manifest:
        raise UsageError("--manifest and --no-manifest exclude each other")
    output = open_output(options.output, cancel=cancel, emit=emit)
    try:
        sink = _manifest_sink(options, output, cancel, emit)
    except BaseException:
        output.abandon()
        raise
    return Store(output, _digests(sink), wake, compression)


def _digests(sink: ManifestSink | None) -> Digests | None:
    if sink is None:
        return None
    # Imported here: an archive without a manifest starts sooner without xxhash.
    from vmapipe.archiver.digests import Digests

    return Digests(sink)


def _manifest_sink(
    options: argparse.Namespace, output: Output, cancel: Cancel, emit: Emit
) -> ManifestSink | None:
    if options.no_manifest:
        return None
    if options.manifest or not output.is_stream:
        name = options.manifest or beside(options.output)
        if is_object(name):
            return _manifest_object(name, not options.manifest, output, cancel, emit)
        if options.manifest and is_stream(name):
            return ManifestOutput(open_output(name, cancel=cancel))
        return ManifestFile(name, replace=not options.manifest)
    if options.manifest_events:
        return ManifestLines(lambda text: emit({"event": "manifest", "text": text}))
    return None


def _manifest_object(
    name: str, replace: bool, output: Output, cancel: Cancel, emit: Emit
) -> ManifestSink:
    from vmapipe.archiver.outputs.object import ObjectOutput

    prepare = output.prepare if isinstance(output, ObjectOutput) else lambda: None
    return ManifestObject(ObjectOutput(name, cancel=cancel, emit=emit, replace=replace), prepare)

# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing, by hand (pip install '.[fuzz]').

python -m tests.fuzz.run decoder FOLDER -max_total_time=600   # libFuzzer's options
python -m tests.fuzz.run keep decoder FOLDER                  # into tests/fuzz/corpus

Its targets: decoder, session (the archiver's wire), qmp, agent, nbd-server-handshake, nbd-server,
nbd-sink, nbd-client-handshake, nbd-client, archive, manifest, files. FOLDER gets the corpus, and every input that reaches new
code; `keep` takes those of them that reach new lines. The tests replay what was kept. An input that finds a defect is written to the current folder.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz import corpus


def fuzz(name: str, folder: Path, options: list[str]) -> None:
    # Imported here: keeping needs it not.
    import atheris

    with atheris.instrument_imports(include=["vmapipe"]):
        from tests.fuzz.targets import LONGEST_BYTES, TARGETS, seeds
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds(name) + corpus.read(name):
        (folder / hashlib.sha256(seed).hexdigest()[:20]).write_bytes(seed)
    words = [sys.argv[0], f"-max_len={LONGEST_BYTES[name]}", *options, str(folder)]
    atheris.Setup(words, TARGETS[name])
    atheris.Fuzz()


def keep(name: str, folder: Path) -> None:
    """Add to the corpus those inputs of `folder`, the shortest first, that reach lines which no other one did."""
    from tests.fuzz.targets import TARGETS

    kept = corpus.read(name)
    reached: set[tuple[str, int]] = set()
    for data in kept:
        reached |= _lines(TARGETS[name], data)
    found = {file.read_bytes() for file in folder.iterdir()}
    for data in sorted(found, key=lambda item: (len(item), item)):
        lines = _lines(TARGETS[name], data)
        if not lines <= reached:
            reached |= lines
            kept.append(data)
    corpus.write(name, kept)


def _lines(target: Callable[[bytes], None], data: bytes) -> set[tuple[str, int]]:
    """The lines of the product that an input reaches, in this thread or another."""
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if "vmapipe" not in frame.f_globals.get("__name__", ""):
            return None
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        target(data)
    finally:
        sys.settrace(None)
        threading.settrace(None)
    return reached


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(sys.argv[2], Path(sys.argv[3]))
    else:
        fuzz(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing, by hand (pip install '.[fuzz]').

python -m tests.fuzz.run decoder FOLDER -max_total_time=600   # libFuzzer's options
python -m tests.fuzz.run keep decoder FOLDER                  # into tests/fuzz/corpus

Its targets: decoder, session (the archiver's wire), qmp, agent, nbd-server-handshake, nbd-server,
nbd-sink, nbd-client-handshake, nbd-client. FOLDER gets the corpus, and every input that reaches new
code. The tests replay what was kept. An input that finds a defect is written to the current folder.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from tests.fuzz import corpus


def fuzz(name: str, folder: Path, options: list[str]) -> None:
    # Imported here: keeping needs it not.
    import atheris

    with atheris.instrument_imports(include=["vmapipe"]):
        from tests.fuzz import talking
        from tests.fuzz.targets import LONGEST_BYTES, TARGETS, written
        from tests.protocol.messages import EXAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    seeds = corpus.read(name)
    if name in ("qmp", "agent"):
        seeds += talking.seeds(name)
    if name == "decoder":
        # Not the cluster: 64 KiB that tell nothing new.
        seeds += [written(each) for kind, each in EXAMPLES.items() if kind != "CLUSTER"]
    for seed in seeds:
        (folder / hashlib.sha256(seed).hexdigest()[:20]).write_bytes(seed)
    words = [sys.argv[0], f"-max_len={LONGEST_BYTES[name]}", *options, str(folder)]
    atheris.Setup(words, TARGETS[name])
    atheris.Fuzz()


def keep(name: str, folder: Path) -> None:
    corpus.write(name, [*corpus.read(name), *(file.read_bytes() for file in folder.iterdir())])


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(sys.argv[2], Path(sys.argv[3]))
    else:
        fuzz(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

# SPDX-License-Identifier: Apache-2.0
"""`vmapipe list PLACE` and `vmapipe verify PLACE`: all archives of a folder, or of a bucket's prefix."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from vmapipe.control.cli.identity import signed_word
from vmapipe.places.archives import KeptArchive, conditions, find_archives, verified_of
from vmapipe.places.listing import json_of, table
from vmapipe.places.place import KeptPlace, is_place, open_place
from vmapipe.places.verified import SUFFIX as VERIFIED_SUFFIX
from vmapipe.places.verified import Candidate, Verified, choose_due, encode_verified
from vmapipe.runtime.cancel import Cancel
from vmapipe.runtime.errors import Damaged, Failure, UsageError
from vmapipe.runtime.text import one_line


def list_place(name: str, options: argparse.Namespace, cancel: Cancel) -> None:
    """Print the table of one place, or a line of JSON for each archive. Raises Failure.

    With `--signed-by` each is read whole; Damaged: not all are signed by whom they should be.
    """
    with contextlib.closing(open_place(name)) as place:
        archives = find_archives(place)
        signed = {
            each.name: found
            for each in archives
            if (found := signed_word(place.full_name(each.name), options, cancel)) is not None
        }
        if options.json:
            for archive, condition in conditions(place, archives):
                fields = json_of(place.full_name(archive.name), archive, condition)
                if archive.name in signed:
                    fields["signed"] = signed[archive.name]
                print(json.dumps(fields))
        else:
            print(f"{one_line(place.name)}: {len(archives)} archives")
            if archives:
                for line in table(conditions(place, archives), signed):
                    print(line)
    wrong = sum(word != "yes" for word in signed.values())
    if wrong:
        raise Damaged(
            f"{name}: {wrong} of {len(archives)} archives are not signed as --signed-by asks"
        )


class KeptVerdict(NamedTuple):
    """Where the verdict on an archive is kept: beside it, in its place.

    `told`: the places where that failed, of all verdicts of one run.
    """

    place: str
    archive: str
    identity: str
    told: set[str]

    def keep(self, started_s: float, *, ok: bool, data_checked: bool) -> None:
        """Never raises: what cannot be written is told.

        What changed while it was verified is as if it had never been: its identity differs.
        """
        verified = Verified(int(started_s), ok, data_checked, self.identity)
        try:
            with contextlib.closing(open_place(self.place)) as place:
                place.write_small(self.archive + VERIFIED_SUFFIX, encode_verified(verified))
        except Failure as failure:
            # In a folder that nobody may write, once and not for each.
            if self.place not in self.told:
                self.told.add(self.place)
                text = f"vmapipe verify: {failure}; what was verified when is not kept there"
                print(one_line(text), file=sys.stderr, flush=True)


def expand(names: Sequence[str], options: argparse.Namespace) -> dict[str, KeptVerdict | None]:
    """Each place as those of its archives that are to be verified now; None: it was named itself.

    A place without any archive stands for itself, with a verdict that names none. Raises Failure, UsageError.
    """
    chosen: dict[str, KeptVerdict | None] = {}
    told: set[str] = set()
    for name in names:
        if not is_place(name):
            if options.older_than is not None or options.sample is not None:
                raise UsageError(
                    f"--older-than and --sample choose archives of a folder or a bucket; {name} is one archive"
                )
            chosen[name] = None
            continue
        with contextlib.closing(open_place(name)) as place:
            archives = {each.name: each for each in find_archives(place)}
            candidates = [Candidate(each.name, _whole_s(place, each)) for each in archives.values()]
            due = choose_due(candidates, options.older_than, options.sample, time.time())
            if archives and not options.json and not options.quiet:
                print(f"{one_line(place.name)}: {len(due)} of {len(archives)} archives are due")
                sys.stdout.flush()
            if not archives:
                chosen[name] = KeptVerdict(name, "", "", told)
            for each in due:
                identity = archives[each].file.identity
                chosen[place.full_name(each)] = KeptVerdict(name, each, identity, told)
    return chosen


def _whole_s(place: KeptPlace, archive: KeptArchive) -> float:
    verified = verified_of(place, archive)
    return float(verified.time_s) if verified is not None and verified.ok else 0.0

# SPDX-License-Identifier: Apache-2.0
"""An archive goes, with all that belongs to it."""

from __future__ import annotations

import stat
import time

from vmapipe.access.drill.result import EVIDENCE_SUFFIX, remove_evidence
from vmapipe.places.archives import PROTECTED_SUFFIX, companions, has_log_of_its_own
from vmapipe.places.listing import lock_text
from vmapipe.places.place import ArchiveFolder, KeptPlace
from vmapipe.runtime.errors import Failure, os_error_text
from vmapipe.runtime.folders import HeldFolder


def remove(place: KeptPlace, archive: str) -> None:
    """With what belongs to it; the archive first, so that none is left without its manifest.

    What another one has removed meanwhile is removed. Raises Failure.
    """
    path = place.full_name(archive)
    if place.has(archive + PROTECTED_SUFFIX):
        raise Failure(f"{path}: it has been protected just now")
    until_s = place.locked_until_s(archive)
    if until_s > time.time():
        raise Failure(f"{path}: it is {lock_text(until_s)}")
    if isinstance(place, ArchiveFolder):
        _check_is_file(place.folder, archive, path)
    place.remove(archive)
    left = []
    for name in companions(archive, has_log=has_log_of_its_own(place, archive)):
        try:
            place.remove(name)
        except Failure as failure:
            left.append(str(failure).removeprefix("cannot remove "))
    if isinstance(place, ArchiveFolder):
        evidence = archive + EVIDENCE_SUFFIX
        try:
            if place.folder.status(evidence) is not None:
                remove_evidence(place.folder, evidence)
        except OSError as error:
            left.append(f"{place.full_name(evidence)}: {os_error_text(error)}")
    if left:
        raise Failure(f"cannot remove {'; '.join(left)}; the archive beside it is removed")


def _check_is_file(folder: HeldFolder, archive: str, path: str) -> None:
    try:
        status = folder.status(archive)
    except OSError as error:
        raise Failure(f"cannot remove {path}: {os_error_text(error)}") from error
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise Failure(f"{path}: it is not a file any more")

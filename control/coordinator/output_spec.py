# SPDX-License-Identifier: Apache-2.0
"""The coordinator's view of the word that says where an archive goes.

Apart from control/coordinator/job.py: commands that back nothing up need this and not that.
"""

from __future__ import annotations

import os
import re

from vmapipe.runtime.errors import UsageError
from vmapipe.runtime.object_names import SCHEME

_DESCRIPTOR = re.compile(r"(?:fd:|/dev/fdset/|/dev/fd/)([0-9]{1,9})")


def is_path(output: str) -> bool:
    """Tell whether an output is a path, and not one of the other words."""
    other = ("exec:", "fd:", "/dev/fdset/", "/dev/fd/", SCHEME)
    return output != "-" and not output.startswith(other)


def goes_to_stdout(output: str) -> bool:
    """Tell whether the archive goes to standard output, so that our words must go elsewhere."""
    match = _DESCRIPTOR.fullmatch(output)
    if output == "-" or (match and int(match[1]) == 1):
        return True
    try:
        return is_path(output) and os.path.samestat(os.stat(output), os.fstat(1))
    except OSError:
        return False


def inherited_fds(output: str) -> list[int]:
    """The descriptor that a word like `fd:7`, or a shell's `>(…)`, names, to be handed on.

    Call it before anything else is opened, or a number that the caller did not
    open may be one of ours. Raises UsageError.
    """
    match = _DESCRIPTOR.fullmatch(output)
    if not match:
        return []
    try:
        os.fstat(int(match[1]))
    except (OSError, OverflowError) as error:
        raise UsageError(f"{output}: no such descriptor is open here") from error
    return [int(match[1])] if int(match[1]) > 2 else []

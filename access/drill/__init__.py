# SPDX-License-Identifier: Apache-2.0
"""The restore test: whether an archive boots, and what is kept of it beside the archive (result.py).

Invariants: the archive is never written to; the guest reaches nothing but this process; every
wait has an end; what was left out of the configuration is named in the result.
"""

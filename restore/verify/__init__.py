# SPDX-License-Identifier: Apache-2.0
"""Checks of an archive: coverage, digests, verdicts.

Read in this order: report.py (pure: findings, verdicts and their texts), coverage.py (pure:
which clusters are there, missing, twice), mapped.py (processes that hash a mapped file),
compare.py (digests of extents and devices), ledger.py (all that is known of each disk,
and the verdict), verify.py (`vmapipe verify`; a restore uses the ledger, too); signature.py (who has made it).

Invariants: a check goes on behind damage and names all of it; memory is bounded
whatever the archive says; nothing is called sound that no digest or checksum has proved.
"""

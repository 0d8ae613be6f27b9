# SPDX-License-Identifier: Apache-2.0
"""From an archive back to disks: the reader, worker processes, targets, and verify."""

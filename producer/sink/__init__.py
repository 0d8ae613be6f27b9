# SPDX-License-Identifier: Apache-2.0
"""The target of QEMU's own backup job: an export that only takes, and always acknowledges."""

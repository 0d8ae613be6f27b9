# SPDX-License-Identifier: Apache-2.0
"""The VMA archive format, both directions. Pure: bytes in, bytes or events out."""

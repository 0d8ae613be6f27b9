# SPDX-License-Identifier: Apache-2.0
"""The process that owns a disk: serves it to a guest, and saves old data before it is written."""

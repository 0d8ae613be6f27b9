# SPDX-License-Identifier: Apache-2.0
"""Tests of kept archives: repacked, copied, listed, locked."""

# SPDX-License-Identifier: Apache-2.0
"""Tests of the source that pulls an NBD export."""

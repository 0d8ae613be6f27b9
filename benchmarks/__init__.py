# SPDX-License-Identifier: Apache-2.0
"""Speed against peers in the same run: `python -m benchmarks --help`."""

# SPDX-License-Identifier: Apache-2.0
"""What can be checked: digests, coverage, a whole archive."""

# SPDX-License-Identifier: Apache-2.0
"""Which old archives may go."""

# SPDX-License-Identifier: Apache-2.0
"""What breaks, and what happens then: docs/failure-modes.md."""

# SPDX-License-Identifier: Apache-2.0
"""What every process of vmapipe shares: errors with exit codes, events, children, cancellation."""

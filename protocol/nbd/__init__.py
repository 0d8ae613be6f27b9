# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol, both ends of it: bytes in, events out; events in, bytes out. No input or output."""

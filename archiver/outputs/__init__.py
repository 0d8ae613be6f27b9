# SPDX-License-Identifier: Apache-2.0
"""Where an archive goes: a file, a stream, a command. `spec.open_output` is the door."""

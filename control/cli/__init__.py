# SPDX-License-Identifier: Apache-2.0
"""The commands of `vmapipe`: a file each has the command line of one, and what it does first to last.

Nothing below imports from here; `control.main` imports a command's file only when it is run.
"""

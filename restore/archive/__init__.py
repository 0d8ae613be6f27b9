# SPDX-License-Identifier: Apache-2.0
"""Archives as they come: files, pipes, commands; plain or compressed; extent after extent."""

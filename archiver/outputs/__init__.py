# SPDX-License-Identifier: Apache-2.0
"""Where an archive goes. All outputs share one interface: write, commit, abandon."""

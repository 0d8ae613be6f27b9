# SPDX-License-Identifier: Apache-2.0
"""One process per archive: the job core, packing, and outputs."""

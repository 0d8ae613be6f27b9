# SPDX-License-Identifier: Apache-2.0
"""Archives where they are kept, in folders and object stores: copied, repacked, put in order."""

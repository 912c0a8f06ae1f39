# SPDX-License-Identifier: Apache-2.0
"""A rendered corpus of talking clips in which the worth of every modality is known."""

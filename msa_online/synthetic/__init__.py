# SPDX-License-Identifier: Apache-2.0
"""A synthetic corpus of talking clips in which the contribution of every modality is known."""

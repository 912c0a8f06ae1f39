# SPDX-License-Identifier: Apache-2.0
"""Missing modalities and frames: what is masked, at which rates."""

# SPDX-License-Identifier: Apache-2.0
"""Masks of missing modalities and frames, in training and evaluation."""

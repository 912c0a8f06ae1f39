# SPDX-License-Identifier: Apache-2.0
"""Layers, losses and Shapley values that several methods share."""

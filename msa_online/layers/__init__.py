# SPDX-License-Identifier: Apache-2.0
"""Layers, losses and measures that several methods share."""

# SPDX-License-Identifier: Apache-2.0
"""Precomputed features: reading, conversion from other formats, and extraction from clips."""

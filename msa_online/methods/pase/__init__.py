# SPDX-License-Identifier: Apache-2.0
"""PaSE: prototypes calibrate and align the modalities, Shapley values balance them (AAAI 2026)."""

from msa_online.methods.pase.head import PaSEHead
from msa_online.methods.pase.modulator import ShapleyModulator

__all__ = ["PaSEHead", "ShapleyModulator"]

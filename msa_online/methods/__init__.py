# SPDX-License-Identifier: Apache-2.0
"""The balancing methods: three plain tables from the name in the configuration to the class.

A module of your own adds a method with `HEADS["mine"] = MyHead`; a configuration names the module in
`plugins`.
"""

from msa_online.methods.balm import FeatureCalibration, RebalancingModulator
from msa_online.methods.base import (
    BalancingHead,
    Calibrator,
    GradientModulator,
    HeadOutput,
    Modulation,
    ModulationContext,
)
from msa_online.methods.cpsl import ConflictModulator, CPSLHead
from msa_online.methods.ebmc import EBMCHead
from msa_online.methods.ithp import ITHPHead
from msa_online.methods.late_fusion import LateFusionHead
from msa_online.methods.mag import MAGHead
from msa_online.methods.misa import MISAHead
from msa_online.methods.mmim import MMIMHead
from msa_online.methods.mult import MulTHead
from msa_online.methods.ogm import OGMModulator
from msa_online.methods.pase.head import PaSEHead
from msa_online.methods.pase.modulator import ShapleyModulator
from msa_online.methods.self_mm import SelfMMHead

HEADS: dict[str, type[BalancingHead]] = {
    "late_fusion": LateFusionHead,
    "ebmc": EBMCHead,
    "cpsl": CPSLHead,
    "pase": PaSEHead,
    "misa": MISAHead,
    "mult": MulTHead,
    "mmim": MMIMHead,
    "self_mm": SelfMMHead,
    "ithp": ITHPHead,
    "mag": MAGHead,
}

MODULATORS: dict[str, type[GradientModulator]] = {
    "identity": GradientModulator,
    "ogm": OGMModulator,
    "conflict": ConflictModulator,
    "rebalance": RebalancingModulator,
    "shapley": ShapleyModulator,
}

CALIBRATORS: dict[str, type[Calibrator]] = {
    "identity": Calibrator,
    "fcm": FeatureCalibration,
}

__all__ = [
    "CALIBRATORS",
    "HEADS",
    "MODULATORS",
    "BalancingHead",
    "CPSLHead",
    "Calibrator",
    "ConflictModulator",
    "EBMCHead",
    "FeatureCalibration",
    "GradientModulator",
    "HeadOutput",
    "LateFusionHead",
    "ITHPHead",
    "MAGHead",
    "MISAHead",
    "MMIMHead",
    "Modulation",
    "ModulationContext",
    "MulTHead",
    "OGMModulator",
    "PaSEHead",
    "RebalancingModulator",
    "SelfMMHead",
    "ShapleyModulator",
]

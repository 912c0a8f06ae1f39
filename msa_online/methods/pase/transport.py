# SPDX-License-Identifier: Apache-2.0
"""Entropic optimal transport between small sets of points, by Sinkhorn's algorithm."""

import torch
from torch import Tensor

from msa_online.layers.precision import in_fp32

NOWHERE = -1e30  # logarithm of a mass of zero; finite, so that differences and gradients stay finite


def transport_plan(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 200,
    unrolled: int = 50,
) -> Tensor:
    """Cheapest plan Q from `rows` to `columns`, with entropic smoothing ((2.3) of docs/methods/pase.md).

        Q = argmin <Q, C> - epsilon H(Q)    subject to    Q 1 = rows,  Q^T 1 = columns

    Works on logarithms in fp32: costs of 1e4 epsilon neither overflow nor vanish. The number of iterations is
    fixed, because a convergence test would synchronise with the GPU in every step.

    Args:
        cost: C, `(..., rows, columns)`.
        rows: Mass of each row, `(..., rows)`, at least 0. A row without mass takes no part.
        columns: Mass of each column, `(..., columns)`, with the same total.
        epsilon: Weight of the entropy, in units of the cost.
        iterations: Number of updates of both marginals.
        unrolled: Number of last updates that the gradient is propagated through.

    Returns:
        Q, in the shape and precision (at least fp32) of `cost`. The column marginals are exact up to
        rounding, the row marginals as far as the iterations have converged.
    """
    kernel = -in_fp32(cost) / epsilon
    log_rows, log_columns = (_log_mass(mass.to(kernel)) for mass in (rows, columns))
    onto_columns = torch.zeros_like(log_columns)
    with torch.no_grad():
        for _ in range(iterations - unrolled):
            onto_rows = log_rows - (kernel + onto_columns.unsqueeze(-2)).logsumexp(dim=-1)
            onto_columns = log_columns - (kernel + onto_rows.unsqueeze(-1)).logsumexp(dim=-2)
    for _ in range(unrolled):
        onto_rows = log_rows - (kernel + onto_columns.unsqueeze(-2)).logsumexp(dim=-1)
        onto_columns = log_columns - (kernel + onto_rows.unsqueeze(-1)).logsumexp(dim=-2)
    return (onto_rows.unsqueeze(-1) + kernel + onto_columns.unsqueeze(-2)).exp()


def _log_mass(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, 1.0).log().where(mass > 0, NOWHERE)

# SPDX-License-Identifier: Apache-2.0
"""Entropic optimal transport between small sets of points."""

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
    """The plan Q that carries `rows` to `columns` most cheaply, smoothed by its entropy (METHODS 2.3).

        Q = argmin <Q, C> - epsilon H(Q)    subject to    Q 1 = rows,  Q^T 1 = columns

    Sinkhorn's algorithm on logarithms in fp32: costs of 1e4 epsilon neither overflow nor vanish. The number
    of iterations is fixed, because asking whether they have converged would stop a GPU in every step.

    Args:
        cost: C, `(..., rows, columns)`.
        rows: Mass of each row, `(..., rows)`, at least 0. A row without mass takes no part.
        columns: The same for columns, `(..., columns)`; the totals have to be equal.
        epsilon: Weight of the entropy, in units of the cost.
        iterations: Updates of both marginals.
        unrolled: The last of them, through which the plan's gradient is taken; the earlier ones only find
            where it is taken.

    Returns:
        Q, of the shape and in the precision (at least fp32) of `cost`. The columns' marginals are met to
        rounding, the rows' as far as the iterations have converged.
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

# SPDX-License-Identifier: Apache-2.0
"""Learned front-ends: one sequence of states from each modality."""

# SPDX-License-Identifier: Apache-2.0
"""Metrics, evaluation under modality conditions, contributions of modalities, and tables of results."""

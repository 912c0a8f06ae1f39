# SPDX-License-Identifier: Apache-2.0
"""Folder for `evaluate.load`: `evaluate.load(str(METRICS_PATH))` works offline and from a wheel."""

from pathlib import Path

METRICS_PATH = Path(__file__).parent

# SPDX-License-Identifier: Apache-2.0
"""Write results as valid JSON, in which NaN and infinity become null."""

import json
import math
from collections.abc import Mapping
from typing import Any


def without_nan(content: Any) -> Any:
    """Plain data with None for every number that is not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return content


def json_text(content: Any, indent: int = 2) -> str:
    """Plain data as JSON; numbers that are not finite become null."""
    return json.dumps(without_nan(content), indent=indent, allow_nan=False)

# SPDX-License-Identifier: Apache-2.0
"""`msa-online get-models`: download or convert pretrained files, into the cache."""

from argparse import Namespace

from rich.console import Console

from feature_extractors.assets import get_asset
from feature_extractors.catalogue import ASSETS, AssetError


def run(options: Namespace, console: Console) -> None:
    """Download pretrained files to the cache."""
    if unknown := [name for name in options.names if name not in ASSETS]:
        raise AssetError(f"unknown model {unknown[0]!r}; known are {', '.join(ASSETS)}")
    for name in options.names or ASSETS:
        console.out(f"{name}: {get_asset(name, progress=console.out)}", highlight=False)

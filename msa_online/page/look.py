# SPDX-License-Identifier: Apache-2.0
"""Colours and fonts of the page. Nothing is loaded from elsewhere."""

import gradio as gr

from msa_online.page.result import STYLE as RESULT_STYLE

STYLE = (
    RESULT_STYLE
    + """
.gradio-container { max-width: 1080px !important; margin: 0 auto; }
#about { font-size: .9rem; color: var(--body-text-color-subdued); margin-top: 1rem; }
#examples { gap: .5rem; }
#video video { max-height: 16rem; }
"""
)


def make_theme() -> gr.themes.Base:
    """Plain, with the fonts of the visitor's system."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )

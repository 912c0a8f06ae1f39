# SPDX-License-Identifier: Apache-2.0
"""A web page to try a checkpoint; it needs gradio, the extra `serve`."""

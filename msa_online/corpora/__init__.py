# SPDX-License-Identifier: Apache-2.0
"""Corpora, the cache they are extracted into, and the batches made of them."""

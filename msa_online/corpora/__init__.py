# SPDX-License-Identifier: Apache-2.0
"""Reading, checking and splitting corpora of clips, and extracting their features into the cache."""

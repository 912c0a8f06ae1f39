# SPDX-License-Identifier: Apache-2.0
"""Studies: variants of a configuration, each with several seeds, and their comparison."""

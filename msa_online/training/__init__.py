# SPDX-License-Identifier: Apache-2.0
"""A run: its configuration, its step, its stages, and what it leaves on disk."""

# SPDX-License-Identifier: Apache-2.0
"""Features made elsewhere: read, converted, computed from clips, and fed to a model."""

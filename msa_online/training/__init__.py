# SPDX-License-Identifier: Apache-2.0
"""Training: configuration, run, epoch loop, stages, teacher, optimizer and checkpoints."""

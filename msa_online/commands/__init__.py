# SPDX-License-Identifier: Apache-2.0
"""The commands of `msa-online`, one module each; `msa_online_cli` reads the command line and calls `run`."""

# SPDX-License-Identifier: Apache-2.0
"""Train a model: `accelerate launch --quiet train.py CONFIG [key=value ...]`.

The same as `msa-online train`. The run itself is `msa_online/training/run.py`: build, fit, finish.
"""

import sys

import msa_online_cli

if __name__ == "__main__":
    sys.exit(msa_online_cli.main(["train", *sys.argv[1:]], program="accelerate launch --quiet train.py"))

# SPDX-License-Identifier: Apache-2.0
# Sourced by demo.sh and test.sh: enter the repository and make sure its environment is there. An active environment is respected.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

# Installing is skipped while neither the pins nor the project's own metadata changed since the last time in this environment.
stamp="$VIRTUAL_ENV/.msa_online-$(cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)-$(pwd | sha256sum | cut -c1-8)"
if [ ! -e "$stamp" ]; then
    python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
    python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
    touch "$stamp"
fi
export TOKENIZERS_PARALLELISM=false

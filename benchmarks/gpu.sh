#!/usr/bin/env bash
# All that one GPU can show, in a few minutes:
#
#     benchmarks/gpu.sh
#     PYTHON=.venv/bin/python benchmarks/gpu.sh --seconds 20
#
# The figures go to stdout and to one file, benchmarks/results/<UTC date>-<GPU>.json. Where torch
# sees no GPU nothing is measured, nothing is written, and the exit status is 0. See gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

cuda=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "none")')
if [[ $cuda != cuda ]]; then
    echo "no GPU here: nothing was measured"
    exit 0
fi
exec "$python" benchmarks/gpu.py "$@"

#!/usr/bin/env bash
# Train, encode, train, sample and measure on handwritten digits, into runs/quickstart.
# Finished stages are picked up; --fresh starts over.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
mkdir -p runs
export QUICKSTART_STARTED_AT="$(date +%s.%N)"
.venv/bin/python scripts/quickstart.py "$@" | tee runs/quickstart.log
[ ! -d runs/quickstart ] || cp runs/quickstart.log runs/quickstart/quickstart.log

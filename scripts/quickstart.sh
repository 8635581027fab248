#!/usr/bin/env bash
# Train, encode, train, sample and measure on handwritten digits, into runs/quickstart.
# Finished stages are picked up; --fresh starts over.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
mkdir -p runs
export PYTHONUNBUFFERED=1
export QUICKSTART_STARTED_AT="$(date +%s.%N)"
# Appended at the end, also of a run that fails: --fresh deletes the folder while this one runs.
keep_log() { [ ! -d runs/quickstart ] || cat runs/.quickstart.log >> runs/quickstart/quickstart.log; }
trap keep_log EXIT
# tee ignores Ctrl-C, so that the last words are kept.
.venv/bin/python scripts/quickstart.py "$@" | tee -i runs/.quickstart.log

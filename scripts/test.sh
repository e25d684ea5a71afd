#!/usr/bin/env bash
# Runs the tests in .venv, which it makes if need be. Arguments go to pytest.
#
#   bash scripts/test.sh            the quick suite
#   FULL=1 bash scripts/test.sh     everything, the PyTorch peer included
#   bash scripts/test.sh -k noise   what matches
#
# UPSTREAM_T5X=FOLDER names a checkout of google-research/t5x; the full suite then
# compares with it, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

# Environments are made side by side.
make_venv .venv-flax-peer requirements-flax-peer.txt &
environments=($!)
if [ -n "${FULL:-}" ]; then
  make_venv .venv-torch-peer requirements-torch-peer.txt &
  environments+=($!)
fi
make_venv .venv requirements-test.txt . runtime
for environment in "${environments[@]}"; do wait "$environment"; done
export FLAX_PEER_PYTHON=$PWD/.venv-flax-peer/bin/python
select=(-m 'not slow and not torch_peer')
if [ -n "${FULL:-}" ]; then
  # The TPU compiler: 140 MB, for plans of runs on TPUs; it needs none.
  make_venv .venv requirements-tpu.txt
  export TORCH_PEER_PYTHON=$PWD/.venv-torch-peer/bin/python
  select=()
  if [ -n "${UPSTREAM_T5X:-}" ]; then
    UPSTREAM_T5X=$(realpath "$UPSTREAM_T5X")
    make_venv .venv-upstream requirements-upstream.txt .
    export UPSTREAM_T5X UPSTREAM_PYTHON=$PWD/.venv-upstream/bin/python
  fi
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
# A file stays on one worker, so that what it compiles is compiled once.
exec .venv/bin/python -m pytest --numprocesses=auto --dist=loadfile --quiet \
  ${select[@]+"${select[@]}"} "$@"

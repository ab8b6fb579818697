#!/bin/sh
# The next unfinished cells of all experiments, the cheapest first, within a number of seconds:
#   OUT=folder sh benchmarks/gpu.sh 540
# What results/ holds is not done again. Wheels are taken from benchmarks/wheels/ and data from benchmarks/data/ if there.
set -eu
seconds=${1:?"say how many seconds, such as 540"}
here=$(dirname "$0")
python=${PYTHON:-python3}
began=$(date +%s)
if ls "$here"/wheels/*.whl >/dev/null 2>&1; then
    site=${TMPDIR:-/tmp}/sparsesoup-wheels
    [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$here"/wheels/*.whl
    export PYTHONPATH="$here/../src:$site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -d "$here/data" ]; then
    export SPARSESOUP_DATA="${SPARSESOUP_DATA:-$here/data}"
fi
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
seconds=$((seconds - $(date +%s) + began))
for worker in $(seq "${WORKERS:-4}"); do
    # The limit of the machine is hard: what would not end is stopped, and its finished pieces are in scratch/.
    timeout "$seconds" "$python" "$here/backlog.py" --seconds "$seconds" --copy "${OUT:-$here/scratch/out}" "--late=$worker" &
done
wait

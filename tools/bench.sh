#!/usr/bin/env bash
# tools/bench.sh NAME...: runs bench.NAME --json one after another; results under build/bench, one file a benchmark.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
mkdir -p build/bench
failed=0
for name in "$@"; do
    if [[ ! -e bench/$name.py ]]; then
        echo "bench.$name: not there"
        continue
    fi
    echo "bench.$name ..."
    if .venv/bin/python -m "bench.$name" --json >"build/bench/$name.json"; then
        echo "bench.$name: build/bench/$name.json"
    else
        echo "bench.$name: failed"
        failed=1
    fi
done
exit $failed

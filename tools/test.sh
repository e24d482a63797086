#!/usr/bin/env bash
# tools/test.sh [--optimized] PYTEST-ARGUMENTS...: the suite from an empty directory against the built wheel, so that a
# module missing from it, or a file found only in the checkout, shows. --optimized: with Python's asserts off.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=("$root/.venv/bin/python")
extra=()
if [[ ${1:-} == --optimized ]]; then
    python+=(-O)
    extra=(-W "ignore::pytest.PytestConfigWarning")  # that asserts outside of tests are off is the point
    shift
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/empty"
cd "$root"
if ! log=$(.venv/bin/python -m hatchling build -t wheel -d "$scratch" 2>&1); then
    echo "$log"
    exit 1
fi
"$root/.venv/bin/python" -m zipfile -e "$scratch"/tiercache-*.whl "$scratch/site"

cd "$scratch/empty"
# The wheel first: the editable install behind it still gives `tests` and `bench`, whose modules import one another.
export PYTHONPATH="$scratch/site:$root"
arguments=() paths=()
for each in "$@"; do  # paths are meant from the checkout
    if [[ -e $root/${each%%::*} ]]; then paths+=("$root/$each"); else arguments+=("$each"); fi
done
[[ ${#paths[@]} -gt 0 ]] || paths=("$root/tests")
"${python[@]}" -m pytest -c "$root/pyproject.toml" --rootdir "$root" "${extra[@]}" "${arguments[@]}" "${paths[@]}"

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
# What needs PyTorch runs once more, in the environment that has it.
torch=("$root"/tests/connectors/test_{transformers_kv,sglang_hicache}.py)
arguments=() paths=() torch_paths=()
for each in "$@"; do  # paths are meant from the checkout
    if [[ -e $root/${each%%::*} ]]; then paths+=("$root/$each"); else arguments+=("$each"); fi
    for one in "${torch[@]}"; do
        if [[ $root/${each%%::*} == "$one" ]]; then torch_paths+=("$root/$each"); fi
    done
done
if [[ ${#paths[@]} -eq 0 ]]; then
    paths=("$root/tests")
    torch_paths=("${torch[@]}")
fi
run() { "$@" -c "$root/pyproject.toml" --rootdir "$root" "${extra[@]}" "${arguments[@]}"; }
# Status 5 is that no test was found: in one of the environments that may be.
run "${python[@]}" -m pytest "${paths[@]}" || [[ $? -eq 5 && ${#torch_paths[@]} -gt 0 ]]
if [[ ${#torch_paths[@]} -gt 0 && -x $root/.venv-torch/bin/python ]]; then
    python[0]=$root/.venv-torch/bin/python
    run "${python[@]}" -m pytest "${torch_paths[@]}" || [[ $? -eq 5 ]]
fi

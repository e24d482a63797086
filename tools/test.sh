#!/usr/bin/env bash
# tools/test.sh [--optimized] PYTEST-ARGUMENTS...: the suite from an empty directory against the built wheel, so that a
# module missing from it, or a file found only in the checkout, shows. --optimized: with Python's asserts off.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=("$root/.venv/bin/python")
if [[ ${1:-} == --optimized ]]; then
    python+=(-O)
    shift
fi
site=$root/build/site
rm -rf "$site" "$root/build/wheel"
mkdir -p "$root/build"
(cd "$root" && .venv/bin/python -m hatchling build -t wheel -d "$root/build/wheel" >"$root/build/wheel.log" 2>&1) || { cat "$root/build/wheel.log"; exit 1; }
"$root/.venv/bin/python" -m zipfile -e "$root"/build/wheel/tiercache-*.whl "$site"

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cd "$empty"
# The wheel first: the editable install behind it still gives `tests` and `bench`, whose modules import one another.
export PYTHONPATH="$site:$root"
arguments=() paths=()
for each in "$@"; do  # paths are meant from the checkout
    if [[ -e $root/${each%%::*} ]]; then paths+=("$root/$each"); else arguments+=("$each"); fi
done
[[ ${#paths[@]} -gt 0 ]] || paths=("$root/tests")
"${python[@]}" -m pytest -c "$root/pyproject.toml" --rootdir "$root" "${arguments[@]}" "${paths[@]}"

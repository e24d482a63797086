#!/usr/bin/env bash
# tools/sglang.sh: .venv-sglang, SGLang without its dependencies (CUDA) on a copy of the engines' environment, which has
# the others. What it wants of CUDA is stood in for by tests/sglang_engine/shim.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/engines.sh
venv=.venv-sglang
if [[ -f $venv/.stamp && $(<"$venv/.stamp") == "$(<.venv-engines/.stamp)" && -e $venv/.sglang-0.5.23 ]]; then
    exit 0
fi
echo "Making $venv"
rm -rf "$venv"
cp -a .venv-engines "$venv"
python=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${python[@]}" orjson IPython gguf
"${python[@]}" --no-deps sglang==0.5.23
touch "$venv/.sglang-0.5.23"

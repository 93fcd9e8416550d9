#!/usr/bin/env bash
# Run the tests with other releases of torch and the like: bash tests/versions.sh [oldest] [newest] [-- OPTIONS OF PYTEST]
# oldest are those that pyproject.toml asks for at least, newest what pip finds, each in an environment of its own in
# $venvs (a folder, kept if it is set), some 6 GB each. Ends with a line of each: releases, and what pytest says.
#
# Last run on a CPU, kernels in the interpreter, Python 3.11:
# torch 2.15.0, triton 3.9.0, transformers 5.24.0, peft 0.21.2, numpy 2.4.6: all of tests/, passed
# torch 2.11.0, triton 3.6.0, transformers 5.17.0, peft 0.21.0, numpy 2.0.2: all of tests/, folder by folder, passed; but
#   tests/scripts/test_package.py, for which that environment's setuptools was older than pyproject.toml asks for
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit

which=()
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        oldest | newest) which+=("$1") ;;
        *) echo "error: $1 is neither oldest nor newest; options of pytest come after --" >&2 && exit 2 ;;
    esac
    shift
done
[[ $# -eq 0 ]] || shift
[[ ${#which[@]} -gt 0 ]] || which=(oldest newest)
if [[ -z "${venvs:-}" ]]; then
    venvs=$(mktemp -d)
    trap 'rm -rf "$venvs"' EXIT
fi

matters="torch triton transformers peft accelerate numpy"  # triton 3.6 has no loops for numpy 2.4 in its interpreter
all=$(sed -n 's/==.*//p' requirements.txt)

# What to install: the packages of requirements.txt, those that matter in their oldest release if $1 is oldest.
wanted() {
    local name least
    for name in $all; do
        least=$(sed -n "s/^ *\"$name>=\([0-9.]*\)\".*/\1/p" pyproject.toml)
        if [[ $1 == oldest && " $matters " == *" $name "* ]]; then echo "$name==$least.*"; else echo "$name"; fi
    done
}

said=() failed=0
for kind in "${which[@]}"; do
    python="$venvs/$kind/bin/python"
    [[ -x $python ]] || "${PYTHON:-python3}" -m venv "$venvs/$kind" || exit
    mapfile -t packages < <(wanted "$kind")
    "$python" -m pip install --quiet --upgrade "${packages[@]}" || exit
    releases=$("$python" -c "
import importlib.metadata, sys
print(', '.join(f'{name} {importlib.metadata.version(name)}' for name in sys.argv[1:]))" $matters)
    echo "versions: $kind, $releases"
    PYTHON=$python bash run_tests.sh "$@" | tee "$venvs/$kind.log" || failed=1
    said+=("$kind ($releases): $(tail -n 1 "$venvs/$kind.log")")
done
printf '%s\n' "${said[@]}"
exit $failed

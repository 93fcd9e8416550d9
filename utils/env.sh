# Sourced by the scripts of the repository root: sets PYTHON to an interpreter that can run the project.
#
# The active python is taken if its packages are recent enough. Otherwise a virtual environment with the pinned packages
# of requirements.txt is made in .venv, once: a stamp with the checksum of requirements.txt says that it is whole.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Silent if the interpreter $1 qualifies, else one line that says why not. What is needed for some uses only (the hub,
# 4 bit, figures, lint; pytest unless `developing` is set) may be missing: that use says so.
_lacks() {
    "$1" - "$_root/requirements.txt" "${developing:-}" <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

MINIMUM = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17), "peft": (0, 21), "accelerate": (1, 15)}
OPTIONAL = {"datasets", "bitsandbytes", "matplotlib", "ruff"}
if not sys.argv[2]:
    OPTIONAL |= {"pytest", "pytest-timeout", "pytest-xdist"}

if sys.version_info < (3, 10):
    sys.exit("needs Python 3.10")
for line in open(sys.argv[1]):
    name = line.partition("==")[0].strip()
    if not name or name in OPTIONAL:
        continue
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"lacks {name}")
    least = MINIMUM.get(name, (0,))
    if tuple(int(n) for n in re.findall(r"\d+", found)[:2]) < least:
        sys.exit(f"has {name} {found}, needs {'.'.join(map(str, least))}")
PY
}

_make_venv() {
    local base=$1 venv="$_root/.venv" stamp="$_root/.venv/requirements.sha256" wanted
    wanted=$(sha256sum < "$_root/requirements.txt")
    exec 9> "$_root/.venv.lock"
    flock 9
    if [[ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]] || ! "$venv/bin/python" -c '' 2> /dev/null; then
        echo "env: making .venv with the packages of requirements.txt (once)"
        rm -rf "$venv"
        "$base" -m venv "$venv" || return
        "$venv/bin/python" -m pip install --quiet -r "$_root/requirements.txt" || return
        echo "$wanted" > "$stamp"
    fi
    exec 9>&-
    PYTHON="$venv/bin/python"
}

_choose_python() {
    local candidate found="" reason=""
    for candidate in "${PYTHON:-}" python python3; do
        candidate=$(command -v "$candidate" 2> /dev/null) || continue
        found=${found:-$candidate}
        if reason=$(_lacks "$candidate" 2>&1); then
            PYTHON=$candidate
            echo "env: using $PYTHON"
            return
        fi
    done
    if [[ -z "$found" ]]; then
        echo "error: no python found: install Python 3.10 or newer" >&2
        return 2
    fi
    _make_venv "$found" || return
    echo "env: using $PYTHON, as $found $reason"
}

_choose_python || return
export PYTHON

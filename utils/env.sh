# Sourced by the scripts of the repository root: sets PYTHON to an interpreter that can run the project, and tells it
# the name of the script.
#
# The active python is taken if its packages are recent enough. Otherwise a virtual environment with the pinned packages
# of requirements.txt is made in .venv, once: a stamp with the checksum of requirements.txt says that it is whole.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

has_gpu() {
    command -v nvidia-smi > /dev/null
}

# Silent if the interpreter $1 qualifies, else one line that says why not. pyproject.toml says what is needed; the extras
# 4bit, gguf, glue, trl and dev, datasets and the tokenizers of bare SentencePiece files are for some uses only, which say
# so themselves; a script that cannot do without some of them names these in `needed`.
_lacks() {
    "$1" - "$_root/pyproject.toml" "${needed:-}" <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

if sys.version_info < (3, 10):
    sys.exit("needs Python 3.10")
optional = {"bitsandbytes", "datasets", "gguf", "matplotlib", "ruff"}
optional |= {"pytest", "pytest-timeout", "pytest-xdist", "scikit-learn", "scipy", "trl"}
optional -= set(sys.argv[2].split())
for name, least in re.findall(r'"([\w-]+)>=([\d.]+)"', open(sys.argv[1]).read()):
    if name in optional or name == "setuptools":
        continue
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"lacks {name}")
    if [int(n) for n in re.findall(r"\d+", found)[:2]] < [int(n) for n in least.split(".")]:
        sys.exit(f"has {name} {found}, needs {least}")
PY
}

# Install the pinned packages into the environment $1. Without a GPU torch's CPU build does, where pip's index has it.
_install() {
    local pip=("$1/bin/python" -m pip) torch
    torch=$(grep '^torch==' "$_root/requirements.txt")
    echo "env: making .venv with the packages of requirements.txt, once"
    if has_gpu; then
        echo "env: about 5.5 GB to fetch, nearly all of it torch and CUDA: minutes on a fast line"
    elif "${pip[@]}" install --quiet --no-deps --dry-run "$torch+cpu" 2> /dev/null; then
        echo "env: no GPU here, so torch's CPU build: about 0.5 GB to fetch, a minute or two"
        "${pip[@]}" install --no-deps "$torch+cpu" || return
    else
        echo "env: no GPU here, but pip's index has torch with CUDA only: about 5.5 GB to fetch, minutes on a fast line"
        echo "env: for 0.5 GB stop it, and start again with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
    fi
    "${pip[@]}" install -r "$_root/requirements.txt" || return
    echo "env: for your own shell: source .venv/bin/activate"
}

_make_venv() {
    local base=$1 venv="$_root/.venv" stamp="$_root/.venv/requirements.sha256" wanted
    wanted=$(sha256sum < "$_root/requirements.txt")
    exec 9> "$_root/.venv.lock"
    flock 9
    if [[ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]] || ! "$venv/bin/python" -c '' 2> /dev/null; then
        rm -rf "$venv"
        "$base" -m venv "$venv" || return
        _install "$venv" || return
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

# Add --name value to `options` for each of these variables that is not empty; the program knows what the others are.
add_options() {
    local name
    for name; do
        [[ -z "${!name:-}" ]] || options+=("--$name" "${!name}")
    done
}

# Whether the chosen python has a GPU to compute on.
sees_gpu() {
    has_gpu && "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'
}

# Exit code 2 if a setting was given that only other scripts have: it would be without effect here.
_refuse_settings_of_others() {
    local name
    for name in $(sed -n 's/^add_options //p' "$_root"/run_*.sh | tr ' ' '\n' | sort -u); do
        if [[ -n "${!name:-}" && " ${options[*]} " != *" --$name "* ]]; then
            echo "error: $name=${!name} is a setting of other scripts, not of $0: give it as --$name if its program" \
                "has that (--help), or unset it" >&2
            return 2
        fi
    done
}

# Run the program $1 of the repository's root with `options`, then what follows. utils/runs/script.py wants to know which
# script and options these were, to tell the user the command that goes on.
start() {
    _refuse_settings_of_others || exit
    export HYCLORA_SCRIPT=$0 HYCLORA_PASSED="${options[*]@Q}"
    export PYTHONUNBUFFERED=1  # a file or a pipe has each line when it is told, between those of progress bars
    exec "$PYTHON" "$_root/$1" "${options[@]}" "${@:2}"
}

_choose_python || return
export PYTHON
gpu=$(sees_gpu && echo True || echo False)
# segments that grow leave fewer gaps between tensors, so that less of the GPU is held
[[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

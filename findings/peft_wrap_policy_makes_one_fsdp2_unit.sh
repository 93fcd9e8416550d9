#!/usr/bin/env bash
# PEFT's fsdp_auto_wrap_policy, which its documentation has given to accelerate's plugin, makes FSDP2 shard a whole model
# as one unit: the weights of all layers are gathered at once, without a word.
#
# accelerate 1.15.0 knows two policies of torch by name, and for any other function shards no layer by itself. With
# transformers 5.24.0 and peft 0.21.2, a LLaMA of three layers: the Trainer by itself shards layers one by one, with
# adapters as without, as it gives accelerate PEFT's policy under the first FSDP alone. With the line
# `plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)` no layer is a unit, and the memory for weights is that of all
# of them. On a CPU accelerate takes no FSDP at all, and the Trainer trains by DDP though fsdp=True was asked for; its
# state is told to take it for the others, two processes each. Fails if any of the four is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.13.0+cpu transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cd "$work"
cat > units.py <<'EOF'
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

way = sys.argv[1]


class OnCpuToo(Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state, plugin = self.accelerator.state, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin, self.is_fsdp_enabled = plugin, True


config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
model = LlamaForCausalLM(config)
if way != "whole":
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
arguments = TrainingArguments(
    "run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, fsdp=True,
    fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
)
trainer = (Trainer if way == "cpu" else OnCpuToo)(model, arguments, train_dataset=rows)
if way == "policy":
    trainer.accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(trainer.model)
trainer.train()
wrapped = trainer.model_wrapped
layers = [module for name, module in wrapped.named_modules() if name.rpartition(".")[0].endswith("layers")]
if trainer.is_world_process_zero():
    kind = "FSDP2" if isinstance(wrapped, FSDPModule) else type(wrapped).__name__
    print(f"{way}: {kind}, {sum(isinstance(layer, FSDPModule) for layer in layers)} of {len(layers)} layers are units")
torch.distributed.destroy_process_group()
EOF
said=$(for way in whole adapters policy cpu; do
    OMP_NUM_THREADS=1 env/bin/torchrun --standalone --nproc_per_node 2 units.py $way 2> err || { cat err >&2; exit 1; }
done | grep -E '^(whole|adapters|policy|cpu): ')
echo "$said"
[[ "$said" == "whole: FSDP2, 3 of 3 layers are units
adapters: FSDP2, 3 of 3 layers are units
policy: FSDP2, 0 of 3 layers are units
cpu: DistributedDataParallel, 0 of 3 layers are units" ]] || {
    echo "this has changed: the finding is out of date"
    exit 1
}

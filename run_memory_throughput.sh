#!/usr/bin/env bash
# Memory and throughput of fine-tuning with HyC-LoRA. Every setting below, and those of HyC-LoRA (preset, layer_type,
# q_bit, ...) and LoRA in utils/settings.sh, can also be given from outside:
#   q_bit=2 bash run_memory_throughput.sh
#   model_name=llama-3-8b seq_len=8192 per_device_train_batch_size=1 bash run_memory_throughput.sh
# Other options of run_memory_throughput.py follow the script: bash run_memory_throughput.sh --steps 20
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# model: a folder of benchmarks/shapes, or of model_dir, with a config.json; random weights need no checkpoint
if [[ "$gpu" == True ]]; then
    model_name=${model_name:-llama-2-7b}
    load_in_4bit=${load_in_4bit:-True}
    device=${device:-cuda}
else
    model_name=${model_name:-tiny-llama}
    load_in_4bit=${load_in_4bit:-False}
    device=${device:-cpu}
fi
random_weights=${random_weights:-True}
shapes=$root/benchmarks/shapes
model_dir=${model_dir-$([[ -d "$shapes/$model_name" ]] && echo "$shapes" || echo "$root/ckpt")}

# evaluation
seq_len=${seq_len:-512}
per_device_train_batch_size=${per_device_train_batch_size:-4}
gradient_checkpointing=${gradient_checkpointing:-False}
evaluate_memory=${evaluate_memory:-True}
evaluate_throughput=${evaluate_throughput:-True}
compare=${compare:-True}            # plain LoRA, without and with checkpointing, in the same table

source "$root/utils/settings.sh"
add_options load_in_4bit random_weights device
add_options seq_len per_device_train_batch_size gradient_checkpointing evaluate_memory evaluate_throughput compare
start run_memory_throughput.py "$@"

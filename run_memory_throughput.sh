#!/usr/bin/env bash
# Memory and throughput of fine-tuning with HyC-LoRA. Every setting below can also be given from outside:
#   q_bit=2 bash run_memory_throughput.sh
#   model_name=llama-3-8b seq_len=8192 per_device_train_batch_size=1 bash run_memory_throughput.sh
# Other options of run_memory_throughput.py follow the script: bash run_memory_throughput.sh --steps 20
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# model: a folder with a config.json in model_dir; random weights need no checkpoint
if command -v nvidia-smi > /dev/null; then
    model_name=${model_name:-llama-2-7b}
    model_dir=${model_dir-$root/benchmarks/shapes}
    load_in_4bit=${load_in_4bit:-True}
    device=${device:-cuda}
else
    model_name=${model_name:-tiny-llama}
    model_dir=${model_dir-$root/ckpt}
    load_in_4bit=${load_in_4bit:-False}
    device=${device:-cpu}
fi
random_weights=${random_weights:-True}

# evaluation
seq_len=${seq_len:-512}
per_device_train_batch_size=${per_device_train_batch_size:-4}
gradient_checkpointing=${gradient_checkpointing:-False}
evaluate_memory=${evaluate_memory:-True}
evaluate_throughput=${evaluate_throughput:-True}

# HyC-LoRA
use_hyclora=${use_hyclora:-True}
layer_type=${layer_type:-intra_inter}
iteration_threshold=${iteration_threshold:-5}
softmax_outlier_ratio=${softmax_outlier_ratio:-0.05}
layernorm_outlier_ratio=${layernorm_outlier_ratio:-0.005}
q_bit=${q_bit:-4}
average_bits=${average_bits:-3.0}  # with q_bit=auto
attention=${attention:-flash}      # eager keeps a sparse map: softmax_outlier_ratio of it
scale_rule=${scale_rule:-channel_group}
offload=${offload:-False}
cuda_graphs=${cuda_graphs:-False}

# LoRA
lora_rank=${lora_rank:-16}
lora_alpha=${lora_alpha:-16}

exec "$PYTHON" "$root/run_memory_throughput.py" \
    --model_name "$model_name" \
    --model_dir "$model_dir" \
    --load_in_4bit "$load_in_4bit" \
    --random_weights "$random_weights" \
    --device "$device" \
    --seq_len "$seq_len" \
    --per_device_train_batch_size "$per_device_train_batch_size" \
    --gradient_checkpointing "$gradient_checkpointing" \
    --evaluate_memory "$evaluate_memory" \
    --evaluate_throughput "$evaluate_throughput" \
    --use_hyclora "$use_hyclora" \
    --layer_type "$layer_type" \
    --iteration_threshold "$iteration_threshold" \
    --softmax_outlier_ratio "$softmax_outlier_ratio" \
    --layernorm_outlier_ratio "$layernorm_outlier_ratio" \
    --q_bit "$q_bit" \
    --average_bits "$average_bits" \
    --attention "$attention" \
    --scale_rule "$scale_rule" \
    --offload "$offload" \
    --cuda_graphs "$cuda_graphs" \
    --lora_rank "$lora_rank" \
    --lora_alpha "$lora_alpha" \
    "$@"

#!/usr/bin/env bash
# Memory and throughput of fine-tuning with HyC-LoRA. Every setting below can also be given from outside:
#   q_bit=2 bash run_memory_throughput.sh
#   model_name=llama-3-8b seq_len=8192 per_device_train_batch_size=1 bash run_memory_throughput.sh
# Other options of run_memory_throughput.py follow the script: bash run_memory_throughput.sh --steps 20
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"
gpu=$(sees_gpu && echo True || echo False)

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

# HyC-LoRA. preset: fastest, least_memory or longest (GPU), paper (the published method), or default (GPU or CPU).
# Each setting below that is not empty replaces what the preset has:
#   layer_type=intra  q_bit=2 (2, 3, 4, 8, auto)  attention=eager  scale_rule=paper  offload=False
#   cuda_graphs=False (True, False, auto)
use_hyclora=${use_hyclora:-True}
preset=${preset:-$([[ "$gpu" == True ]] && echo least_memory || echo default)}
layer_type=${layer_type:-}                            # baseline, intra, intra_inter, intra_inter_full_fuse
q_bit=${q_bit:-}
average_bits=${average_bits:-}                        # with q_bit=auto
iteration_threshold=${iteration_threshold:-}          # training forwards that calibrate
softmax_outlier_ratio=${softmax_outlier_ratio:-}      # with attention=eager
layernorm_outlier_ratio=${layernorm_outlier_ratio:-}
attention=${attention:-}
scale_rule=${scale_rule:-}
offload=${offload:-}
cuda_graphs=${cuda_graphs:-}

# LoRA
lora_rank=${lora_rank:-16}
lora_alpha=${lora_alpha:-16}

options=(--model_dir "$model_dir")
add_options model_name load_in_4bit random_weights device
add_options seq_len per_device_train_batch_size gradient_checkpointing evaluate_memory evaluate_throughput compare
add_options use_hyclora preset layer_type q_bit average_bits iteration_threshold softmax_outlier_ratio
add_options layernorm_outlier_ratio attention scale_rule offload cuda_graphs
add_options lora_rank lora_alpha
start run_memory_throughput.py "$@"

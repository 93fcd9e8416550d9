#!/usr/bin/env bash
# Fine-tune on GSM8K, or on your own rows, with HyC-LoRA. Every setting below can also be given from outside:
#   q_bit=2 bash run_gsm8k.sh
#   model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh
#   model_name=llama-2-7b-hf data_name=json data_dir=my_rows.jsonl bash run_gsm8k.sh
# Other options of run_gsm8k.py follow the script: bash run_gsm8k.sh --max_steps 20 --lora_dropout 0.05
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"
gpu=$(sees_gpu && echo True || echo False)

# model
model_name=${model_name:-tiny-llama}
model_dir=${model_dir-$root/ckpt}

# data: demo (generated word problems), gsm8k (from data_dir, or from the hub if data_dir is empty) or json (your rows:
# data_dir is a .json or .jsonl file, or a folder with train.jsonl and, to be evaluated, test.jsonl)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
seq_len=${seq_len:-512}

# HyC-LoRA. preset: fastest, least_memory or longest (GPU), paper (the published method), or default (GPU or CPU).
# Each setting below that is not empty replaces what the preset has:
#   layer_type=intra  q_bit=2 (2, 3, 4, 8, auto)  attention=eager  scale_rule=paper  offload=False
#   cuda_graphs=False (True, False, auto)  stream=False (True, False, auto)
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
stream=${stream:-}                                    # compute no padding

# LoRA
lora_rank=${lora_rank:-16}
lora_alpha=${lora_alpha:-16}
lora_init_type=${lora_init_type:-qlora}

# training: the paper's settings, or for the demo one epoch of 150 steps
seed=${seed:-11}
if [[ "$data_name" == demo ]]; then
    learning_rate=${learning_rate:-2e-3}
    num_train_epochs=${num_train_epochs:-1}
    per_device_train_batch_size=${per_device_train_batch_size:-16}
    gradient_accu_steps=${gradient_accu_steps:-1}
    load_in_4bit=${load_in_4bit:-False}
    evaluate_before=${evaluate_before:-True}
    max_new_tokens=${max_new_tokens:-128}
else
    learning_rate=${learning_rate:-3e-4}
    num_train_epochs=${num_train_epochs:-6}
    per_device_train_batch_size=${per_device_train_batch_size:-4}
    gradient_accu_steps=${gradient_accu_steps:-4}
    load_in_4bit=${load_in_4bit:-$gpu}
    evaluate_before=${evaluate_before:-$([[ "$data_name" == json ]] && echo True || echo False)}  # a loss is quick
    max_new_tokens=${max_new_tokens:-256}
fi

options=(--model_dir "$model_dir" --gradient_accumulation_steps "$gradient_accu_steps")
add_options model_name load_in_4bit data_name data_dir seq_len
add_options use_hyclora preset layer_type q_bit average_bits iteration_threshold softmax_outlier_ratio
add_options layernorm_outlier_ratio attention scale_rule offload cuda_graphs stream
add_options lora_rank lora_alpha lora_init_type
add_options seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before max_new_tokens
start run_gsm8k.py "$@"

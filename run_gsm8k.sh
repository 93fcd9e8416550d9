#!/usr/bin/env bash
# Fine-tune on GSM8K, or on your own rows, with HyC-LoRA. Every setting below can also be given from outside:
#   q_bit=2 bash run_gsm8k.sh
#   model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh
#   model_name=llama-2-7b-hf data_name=json data_dir=my_rows.jsonl bash run_gsm8k.sh
# Other options of run_gsm8k.py follow the script: bash run_gsm8k.sh --max_steps 20 --lora_dropout 0.05
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# model
model_name=${model_name:-tiny-llama}
model_dir=${model_dir-$root/ckpt}

# data: demo (generated word problems), gsm8k (from data_dir, or from the hub if data_dir is empty) or json (your rows:
# data_dir is a .json or .jsonl file, or a folder with train.jsonl and, to be evaluated, test.jsonl)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
seq_len=${seq_len:-512}

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
    load_in_4bit=${load_in_4bit:-$(command -v nvidia-smi > /dev/null && echo True || echo False)}
    evaluate_before=${evaluate_before:-False}
    max_new_tokens=${max_new_tokens:-256}
fi

exec "$PYTHON" "$root/run_gsm8k.py" \
    --model_name "$model_name" \
    --model_dir "$model_dir" \
    --load_in_4bit "$load_in_4bit" \
    --data_name "$data_name" \
    --data_dir "$data_dir" \
    --seq_len "$seq_len" \
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
    --lora_init_type "$lora_init_type" \
    --learning_rate "$learning_rate" \
    --seed "$seed" \
    --num_train_epochs "$num_train_epochs" \
    --per_device_train_batch_size "$per_device_train_batch_size" \
    --gradient_accumulation_steps "$gradient_accu_steps" \
    --evaluate_before "$evaluate_before" \
    --max_new_tokens "$max_new_tokens" \
    "$@"

#!/usr/bin/env bash
# Fine-tune on GSM8K, or on your own rows, with HyC-LoRA. Every setting below, and those of the model, HyC-LoRA (preset,
# layer_type, q_bit, ...) and LoRA in utils/settings.sh, can also be given from outside:
#   q_bit=2 bash run_gsm8k.sh
#   model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh
#   model_name=llama-2-7b-hf data_name=json data_dir=my_rows.jsonl bash run_gsm8k.sh
# Other options of run_gsm8k.py follow the script: bash run_gsm8k.sh --max_steps 20 --lora_dropout 0.05
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# data: demo (generated word problems), gsm8k (from data_dir, or from the hub if data_dir is empty) or json (your rows:
# data_dir is a .json or .jsonl file, or a folder with train.jsonl and, to be evaluated, test.jsonl)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
seq_len=${seq_len:-512}

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

num_gpus=${num_gpus:-}  # of this machine, one process each
parallel=${parallel:-}  # ddp: each has all weights; fsdp2: they share them

source "$root/utils/settings.sh"
options+=(--gradient_accumulation_steps "$gradient_accu_steps")
add_options load_in_4bit data_name data_dir seq_len
add_options num_gpus parallel non_finite seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before
add_options max_new_tokens
start run_gsm8k.py "$@"

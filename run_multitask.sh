#!/usr/bin/env bash
# Fine-tune on arithmetic word problems with HyC-LoRA, and be judged by several test sets at once. Every setting below,
# and those of the model, HyC-LoRA (preset, layer_type, q_bit, ...) and LoRA in utils/settings.sh, can also be given from
# outside:
#   bash download_datasets.sh arithmetic gsm8k
#   model_name=llama-2-7b-hf data_name=arithmetic bash run_multitask.sh
#   data_name=arithmetic train_file=data/gsm8k/train.jsonl tests=SVAMP,AddSub bash run_multitask.sh
# Other options of run_multitask.py follow the script: bash run_multitask.sh --max_steps 20 --max_eval_samples 100
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# data: demo (generated word problems) or arithmetic (train_file, and the test sets in data_dir, each NAME/test.json)
data_name=${data_name:-demo}
data_dir=${data_dir:-}        # empty: data/arithmetic, which download_datasets.sh fills
train_file=${train_file:-}    # empty: Math10K, math_10k.json in data_dir
tests=${tests:-}              # empty: gsm8k,SVAMP,mawps,AQuA; there are AddSub,MultiArith,SingleEq too
drop_seen=${drop_seen:-False} # leave out the training rows whose question is tested
seq_len=${seq_len:-512}

# training: the paper's settings, or for the demo one epoch of 100 steps
seed=${seed:-11}
greedy=${greedy:-True}
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
    num_train_epochs=${num_train_epochs:-12}
    per_device_train_batch_size=${per_device_train_batch_size:-4}
    gradient_accu_steps=${gradient_accu_steps:-4}
    load_in_4bit=${load_in_4bit:-$gpu}
    evaluate_before=${evaluate_before:-False}
    max_new_tokens=${max_new_tokens:-512}
fi

num_gpus=${num_gpus:-}  # of this machine, one process each
parallel=${parallel:-}  # ddp: each has all weights; fsdp2: they share them

source "$root/utils/settings.sh"
options+=(--gradient_accumulation_steps "$gradient_accu_steps")
add_options num_gpus parallel non_finite load_in_4bit data_name data_dir train_file tests drop_seen seq_len
add_options seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before greedy max_new_tokens
start run_multitask.py "$@"

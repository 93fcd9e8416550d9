#!/usr/bin/env bash
# Fine-tune on a task of GLUE with HyC-LoRA. Every setting below, and those of the model, HyC-LoRA (preset, layer_type,
# q_bit, ...) and LoRA in utils/settings.sh, can also be given from outside:
#   q_bit=2 bash run_glue.sh
#   data_name=rte model_name=roberta-base bash run_glue.sh
#   data_name=mrpc data_dir=../shared/data/glue model_name=roberta-base seed=12 bash run_glue.sh
# Other options of run_glue.py follow the script: bash run_glue.sh --max_steps 20 --lora_dropout 0.05
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
needed="scikit-learn scipy"
source "$root/utils/env.sh"

# data: demo (generated reviews), or a task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli (the official tsv files
# in data_dir, such as data_dir/RTE/train.tsv, or from the hub if data_dir is empty)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
seq_len=${seq_len:-512}                               # longest row in tokens, at most the positions of the model
target_modules=${target_modules:-all-linear}          # the head is trained in any case

# training; the demo is one epoch of 200 steps
seed=${seed:-11}
if [[ "$data_name" == demo ]]; then
    learning_rate=${learning_rate:-2e-3}
    num_train_epochs=${num_train_epochs:-1}
    per_device_train_batch_size=${per_device_train_batch_size:-16}
else
    learning_rate=${learning_rate:-5e-4}
    num_train_epochs=${num_train_epochs:-10}
    per_device_train_batch_size=${per_device_train_batch_size:-32}
fi
gradient_accu_steps=${gradient_accu_steps:-1}
load_in_4bit=${load_in_4bit:-False}
evaluate_before=${evaluate_before:-True}

num_gpus=${num_gpus:-}  # of this machine, one process each
parallel=${parallel:-}  # ddp: each has all weights; fsdp2: they share them

source "$root/utils/settings.sh"
options+=(--gradient_accumulation_steps "$gradient_accu_steps")
add_options load_in_4bit data_name data_dir seq_len target_modules
add_options num_gpus parallel non_finite seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before
start run_glue.py "$@"

#!/usr/bin/env bash
# Fine-tune on long rows with HyC-LoRA, on top of gradient checkpointing; perplexity at several lengths before and after.
# Every setting below, and those of the model, HyC-LoRA (preset, layer_type, q_bit, ...) and LoRA in utils/settings.sh, can
# also be given from outside:
#   model_name=llama-2-7b-hf data_name=text data_dir=redpajama eval_files=pg19/test.bin rope_scaling=2 bash run_longseq.sh
#   model_name=llama-2-7b-hf data_name=text data_dir=books seq_len=32768 rope_scaling=8 group_size=8192 bash run_longseq.sh
# Other options of run_longseq.py follow the script: bash run_longseq.sh --max_steps 20 --gradient_checkpointing False
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# data: demo (a generated text) or text (your own: data_dir is a data set that save_to_disk wrote, a .bin file of token
# ids as uint16, or a folder of documents: .txt, .tex, .md, .jsonl)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
eval_files=${eval_files:-}              # files or folders, in data_dir or anywhere: evaluated on, and not trained on

# long rows
group_size=${group_size:-}              # shifted sparse attention: a quarter of seq_len; empty: full attention
trainable_params=${trainable_params:-}  # with adapters alone, or also: norm,embed
seed=${seed:-11}
evaluate_before=${evaluate_before:-True}
if [[ "$data_name" == demo ]]; then
    seq_len=${seq_len:-2048}            # tokens of a row
    rope_scaling=${rope_scaling:-2}     # the demo's model has 1024 positions
    eval_lengths=${eval_lengths:-512 1024 2048}
    stride=${stride:-256}               # of the sliding windows
    learning_rate=${learning_rate:-2e-3}
    num_train_epochs=${num_train_epochs:-1}
    per_device_train_batch_size=${per_device_train_batch_size:-1}
    gradient_accu_steps=${gradient_accu_steps:-1}
    load_in_4bit=${load_in_4bit:-False}
else
    seq_len=${seq_len:-8192}
    rope_scaling=${rope_scaling:-}      # needed where a row is longer than the model's positions
    eval_lengths=${eval_lengths:-2048 4096 8192}
    stride=${stride:-256}
    learning_rate=${learning_rate:-2e-5}
    num_train_epochs=${num_train_epochs:-1}
    per_device_train_batch_size=${per_device_train_batch_size:-1}
    gradient_accu_steps=${gradient_accu_steps:-8}
    load_in_4bit=${load_in_4bit:-$gpu}
fi

# HyC-LoRA: with checkpointing the input of each layer is kept, in host memory on a GPU, and here in 8 bit (or as
# layers= says, for instance input4)
preset=${preset:-$([[ "$gpu" == True && -z "${memory_budget:-}" ]] && echo longest || echo default)}
exact=$([[ "${use_hyclora:-}" == False || "${layer_type:-}" == baseline ]] && echo True || echo False)
slot_savers=${slot_savers-$([[ "$exact" == True || -n "${layers:-}" ]] || echo '{"layer_in": "quant8"}')}

num_gpus=${num_gpus:-}  # of this machine, one process each
parallel=${parallel:-}  # ddp: each has all weights; fsdp2: they share them

source "$root/utils/settings.sh"
options+=(--gradient_accumulation_steps "$gradient_accu_steps")
add_options num_gpus parallel non_finite load_in_4bit data_name data_dir eval_files seq_len group_size rope_scaling
add_options trainable_params slot_savers
add_options eval_lengths stride seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before
start run_longseq.py "$@"

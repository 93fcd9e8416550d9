#!/usr/bin/env bash
# Instruction tuning on one GPU in plain PyTorch, each technique off or on. Every setting below, and those of the model,
# HyC-LoRA (preset, layer_type, q_bit, ...) and LoRA in utils/settings.sh, can also be given from outside:
#   mixed_precision=bf16 gradient_checkpointing='2 of 3' bash run_alpaca.sh
#   data_name=alpaca model_name=llama-2-7b-hf bash run_alpaca.sh
#   sweep=True bash run_alpaca.sh                       # every combination of what is on, each off and on
# Other options of run_alpaca.py follow the script: bash run_alpaca.sh --max_steps 20 --temperature 0.8
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# data: demo (generated problems) or alpaca (data_dir is a JSON list of rows with instruction, input and output, or empty
# for the hub)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
seq_len=${seq_len:-512}

# techniques; use_lora=False trains all weights, which HyC-LoRA is not for. With sweep=True all of them are on, so that
# each is measured off and on.
sweep=${sweep:-False}
sweep_gpus=${sweep_gpus:-}                             # that measure side by side, a combination each
sweep_timeout=${sweep_timeout:-}                       # seconds for a combination
sweep_minutes=${sweep_minutes:-}                       # ends the sweep, which the same command goes on with
sweep_peers=${sweep_peers:-}                           # True, with --dtype bfloat16: Unsloth on the same rows
if [[ "$sweep" == True ]]; then
    gradient_checkpointing=${gradient_checkpointing:-2 of 3}
    mixed_precision=${mixed_precision:-bf16}
    if [[ "$data_name" == demo ]]; then  # a CPU computes in 16 bit much slower than in float32
        gradient_accumulation=${gradient_accumulation:-4}
        max_train_samples=${max_train_samples:-8}
    fi
else
    gradient_checkpointing=${gradient_checkpointing:-off}  # off, all, or '2 of 3': every third layer is left out
    mixed_precision=${mixed_precision:-off}                # off (float32), bf16, or fp16 (GPU)
    evaluate_before=${evaluate_before:-True}
    # tokens that are written after the four test prompts, before and after training
    max_new_tokens=${max_new_tokens:-$([[ "$data_name" == demo ]] && echo 32 || echo 64)}
fi
gradient_accumulation=${gradient_accumulation:-8}          # micro-batches a step; 1 is off
max_train_samples=${max_train_samples:-200}                # the first rows
use_lora=${use_lora:-True}
use_hyclora=${use_hyclora:-$use_lora}
lora_alpha=${lora_alpha:-32}
lora_dropout=${lora_dropout:-0.05}

# training: the assignment's settings, but for the demo a learning rate that 25 steps show something of
seed=${seed:-11}
learning_rate=${learning_rate:-$([[ "$data_name" == demo ]] && echo 1e-3 || echo 1e-5)}
num_train_epochs=${num_train_epochs:-1}
per_device_train_batch_size=${per_device_train_batch_size:-1}
load_in_4bit=${load_in_4bit:-False}

# how it is written
temperature=${temperature:-0}
top_p=${top_p:-0.9}
use_cache=${use_cache:-True}

source "$root/utils/settings.sh"
add_options sweep sweep_gpus sweep_timeout sweep_minutes sweep_peers
add_options gradient_accumulation gradient_checkpointing mixed_precision use_lora lora_dropout
add_options load_in_4bit data_name data_dir seq_len max_train_samples
add_options non_finite seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before
add_options max_new_tokens temperature top_p use_cache
start run_alpaca.py "$@"

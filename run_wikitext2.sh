#!/usr/bin/env bash
# Fine-tune on WikiText-2, or on your own text, with HyC-LoRA; perplexity before and after. Every setting below, and those
# of the model, HyC-LoRA (preset, layer_type, q_bit, ...) and LoRA in utils/settings.sh, can also be given from outside:
#   q_bit=2 bash run_wikitext2.sh
#   model_name=llama-2-7b-hf data_name=wikitext2 bash run_wikitext2.sh
#   model_name=smollm2-135m data_name=text data_dir=my_book.txt bash run_wikitext2.sh
# Other options of run_wikitext2.py follow the script: bash run_wikitext2.sh --max_steps 20 --lora_dropout 0.05
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/env.sh"

# data: demo (a generated text), wikitext2 (from data_dir, or from the hub if data_dir is empty) or text (your own:
# data_dir is a file, or a folder with train.txt and, to be evaluated, test.txt)
data_name=${data_name:-demo}
data_dir=${data_dir:-}
eval_file=${eval_file:-}                # of data_dir, in place of wiki.test.raw or test.txt

# training: the paper's settings, or for the demo short blocks
seed=${seed:-11}
evaluate_before=${evaluate_before:-True}
if [[ "$data_name" == demo ]]; then
    seq_len=${seq_len:-256}             # tokens of a block
    stride=${stride:-128}               # of the sliding window; 0: no sliding window
    learning_rate=${learning_rate:-2e-3}
    num_train_epochs=${num_train_epochs:-1}
    per_device_train_batch_size=${per_device_train_batch_size:-8}
    gradient_accu_steps=${gradient_accu_steps:-1}
    load_in_4bit=${load_in_4bit:-False}
else
    seq_len=${seq_len:-1024}
    stride=${stride:-512}
    learning_rate=${learning_rate:-3e-4}
    num_train_epochs=${num_train_epochs:-3}
    per_device_train_batch_size=${per_device_train_batch_size:-4}
    gradient_accu_steps=${gradient_accu_steps:-4}
    load_in_4bit=${load_in_4bit:-$gpu}
fi

num_gpus=${num_gpus:-}  # of this machine, one process each
parallel=${parallel:-}  # ddp: each has all weights; fsdp2: they share them

source "$root/utils/settings.sh"
options+=(--gradient_accumulation_steps "$gradient_accu_steps")
add_options load_in_4bit data_name data_dir eval_file seq_len stride
add_options num_gpus parallel non_finite seed learning_rate num_train_epochs per_device_train_batch_size evaluate_before
start run_wikitext2.py "$@"

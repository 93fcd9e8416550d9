# Sourced by the run_*.sh, after their own settings: those that all of them share, and the options made of all.

# model: a folder in model_dir, or a hub id with model_dir=''
model_name=${model_name:-tiny-llama}
model_dir=${model_dir-$root/ckpt}

# GPU memory to stay within, such as 20GiB: what is not set below is chosen by the model and by the longest rows
memory_budget=${memory_budget:-}

# HyC-LoRA. preset: fastest, least_memory or longest (GPU), paper (the published method), or default (GPU or CPU).
# Each setting below that is not empty replaces what the preset has:
#   layer_type=intra  q_bit=2 (2, 3, 4, 8, auto)  attention=eager  scale_rule=paper  offload=False
#   offload_embeddings=True  cuda_graphs=False (True, False, auto)  stream=False (True, False, auto)
use_hyclora=${use_hyclora:-True}
preset=${preset:-$([[ "$gpu" == True && -z "$memory_budget" ]] && echo least_memory || echo default)}
layer_type=${layer_type:-}                            # baseline, intra, intra_inter, intra_inter_full_fuse
q_bit=${q_bit:-}
average_bits=${average_bits:-}                        # with q_bit=auto
iteration_threshold=${iteration_threshold:-}          # training forwards that calibrate
softmax_outlier_ratio=${softmax_outlier_ratio:-}      # with attention=eager
layernorm_outlier_ratio=${layernorm_outlier_ratio:-}
attention=${attention:-}
scale_rule=${scale_rule:-}
offload=${offload:-}
offload_embeddings=${offload_embeddings:-}            # True: frozen, untied embeddings wait in host memory
cuda_graphs=${cuda_graphs:-}
stream=${stream:-}                                    # compute no padding
layers=${layers:-}                                    # input8, input4: keep layer inputs alone, run layers again
verify=${verify:-}                                    # True: first compare gradients with exact LoRA's
verify_threshold=${verify_threshold:-}                # the smallest cosine to train with
non_finite=${non_finite:-}                            # stop, or skip steps with NaN (of the scripts that train)

# LoRA
lora_rank=${lora_rank:-16}
lora_alpha=${lora_alpha:-16}
lora_init_type=${lora_init_type:-qlora}

options=(--model_dir "$model_dir")
add_options model_name
add_options memory_budget
add_options use_hyclora preset layer_type q_bit average_bits iteration_threshold softmax_outlier_ratio
add_options layernorm_outlier_ratio attention scale_rule offload offload_embeddings cuda_graphs stream layers
add_options verify verify_threshold
add_options lora_rank lora_alpha lora_init_type

"""What a block computes: autograd Functions, their Triton kernels, and how what they keep for backward is packed.

The way down: a block of models/blocks.py calls a Function (attention/, mlp/, norm.py); its Keeper (savers/base.py)
hands each slot to a saver (savers/channel_quant.py); that calls packing/quantize.py, whose kernel packs the bits.

reference.py      the truth of every operator in plain torch; CPU tensors run it
dispatch.py       Triton kernels or reference.py
attention/        q, k, v, rotary positions, softmax, output       norm.py            RMSNorm
layer_norm.py     LayerNorm of a block's output and the residual   cross_entropy.py   LM head and loss, without logits
mlp/              gate, up, SiLU, product, down; or up, GELU, down
linear/           frozen weights (NF4 too) and LoRA adapters       checkpoint.py      a layer that is run again
packing/          2, 3, 4, 8 bit: codes, scales, layout            token_tiles.py     long inputs, a tile at a time
savers/           the ways of keeping one slot                     store/             packed slots in host memory
pausable.py       what can be switched off for a while             first_order.py     what a backward begins with
random_state.py   what is drawn again                              entry.py           where a graph begins
"""

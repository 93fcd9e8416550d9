"""Frozen linear layers with LoRA adapters.

lora.py           y = x W^T + LoRA, forward and gradients               nf4.py             NF4 weights to floating point
low_rank.py       the adapters of several layers as one                 weight_pieces.py   W made a piece at a time
low_rank_grad.py  both products that backward makes of dy               residual.py        the sum where a block ends
dropout.py        masks made of a seed where they are used
"""

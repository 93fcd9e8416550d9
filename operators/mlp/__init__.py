"""The gated MLP block.

mlp.py          gate, up, SiLU, product, down, in one Function          activation.py   SiLU and product
fused_mlp.py    LoRA, SiLU, product and the packing of gate and up in one kernel
"""

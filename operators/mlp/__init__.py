"""The MLP block, gated or not.

mlp.py          the linear layers and what is between them, in one Function      activation.py   SiLU and product; GELU
fused_mlp.py    LoRA, SiLU, product and the packing of gate and up in one kernel    fused_gelu.py   LoRA, GELU, packing
"""

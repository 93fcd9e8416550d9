"""The attention block.

attention.py    projections, rotary positions, softmax attention, output, in one Function
flash.py        attention of runs of tokens, no map of S x S            softmax.py        backward from a kept map
flash4.py       the same by flash-attn-4, where that is faster
rope.py         rotary positions                                        hollow_graph.py   attention with its lse kept
shifted.py      groups of tokens, shifted in half of the heads
fused_qkv.py    LoRA, rotary positions and packing of q, k, v in one kernel
"""

"""What a block computes, and how what it keeps is packed.

The way down: a block of models/blocks.py calls a Function (attention.py, mlp.py, norm.py); its Keeper (savers/base.py)
hands each slot to a saver (savers/channel_quant.py); that calls quantize.py, whose kernel packs the bits.
"""

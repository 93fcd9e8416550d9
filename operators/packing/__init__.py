"""From activations to packed bits and back.

codebook.py     how a normalised number becomes a code of b bits        layout.py   where codes and scales lie
quantize.py     the kernels that pack and unpack a tensor               programs.py      what a program of them takes
fused_tiles.py  the same inside other kernels
"""

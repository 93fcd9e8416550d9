"""All layers of a model as CUDA graphs, for batches of a kind that comes again.

layer_graphs.py  what is recorded and when it is replayed       recording.py  one recorded forward and backward
gradients.py     how gradients reach the parameters             foresight.py  what the first layer is going to get
sizes.py         which rows of tokens share a recording
"""

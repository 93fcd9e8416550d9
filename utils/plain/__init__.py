"""What a training loop in plain PyTorch needs beside the loop, which is in run_alpaca.py.

arguments.py    its settings: the techniques, and the few of the Trainer's that it has
checkpoints.py  its checkpoints                              progress.py    losses, time and memory of a run
breakdown.py    what takes memory and FLOPs in a step
"""

"""Everything around the model: arguments, data, training loop, metrics, results.

args.py         command line of every driver                 trainer.py        HF's Trainer, stopped and resumed safely
data/           training and test data                       metrics.py        accuracy of generated answers
loading.py      base model, tokenizer, LoRA adapters         results.py        what a run leaves behind
errors.py       how a run ends early                         profiling.py      bytes, memory and time of a step
disk.py         whether there is room for results
"""

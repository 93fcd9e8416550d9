"""Everything around the model that drivers need: arguments, data, training loop, metrics, results.

args.py         command line of every driver                 checks.py         settings that cannot work, refused first
data/           training and test data                       tasks.py          what is trained on, and how it is judged
loading.py      base model, tokenizer, LoRA adapters         trainer.py        HF's Trainer, stopped and resumed safely
metrics.py      accuracy of generated answers, loss          profiling.py      bytes, memory and time of a step
runs.py         a run's folder, its resume and its endings   checkpoints.py    checkpoints that are whole
identity.py     which settings a run is known by             script.py         the command that started it, to repeat
results.py      what a run leaves behind                     card.py           adapters to give away, with a README.md
errors.py       how a run ends early                         disk.py           whether there is room for results
"""

"""Everything around the model that drivers need: arguments, data, training loop, metrics, results.

driver.py       the course of a run, the same for all        tasks.py          what is trained on, and how it is judged
args.py         command line of every driver                 checks.py         settings that cannot work, refused first
training_arguments.py  those of HF's Trainer             fidelity.py       verify() on a checkpoint and rows of a user's
data/           training and test data                       disk.py           whether there is room for results
loading.py      base model, tokenizer, LoRA adapters         trainer.py        HF's Trainer, stopped and resumed safely
tokenizer.py    ids as the model was trained with            weights.py       dtypes that tensors are stored in
metrics.py      accuracy of generated answers, loss          answers.py        what a generated text ends at
profiling.py    bytes, memory and time of a step             perplexity.py     language modelling, before and after
heads.py        what a model gives: a token, a class         classification.py texts told apart, GLUE's metrics
generate.py     token by token, with and without a cache     errors.py         how a run ends early
interrupts.py   and by Ctrl-C while it imports
plain/          for a training loop without the Trainer      folder.py        a base model's files, looked at first
runs/           a run's folder, resume and endings           results.py        what a run leaves behind
planning/       memory of a run, before it begins            within_budget.py  memory_budget of the scripts
checkpointing.py  layers that run again in backward
sharded.py      weights shared by processes (FSDP2)          ranks.py         what the processes of a run do together
"""

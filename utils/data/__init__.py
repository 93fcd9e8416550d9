"""Training and test data, one module a task; a module reads rows and turns them into token ids and labels.

gsm8k.py        GSM8K, as the paper trains it                word_problems.py  problems like it, generated from a seed
pretrain_text.py  text to pre-train a tiny model on
"""

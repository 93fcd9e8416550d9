"""Training and test data: rows that are read or generated, and how they become token ids and labels.

gsm8k.py        GSM8K, as the paper trains it                word_problems.py  problems like it, generated from a seed
instructions.py own rows in four formats                     chat.py           chats in the tokenizer's own template
files.py        JSON rows, each with its place               tokens.py         token ids, labels, batches
text.py         plain text: blocks, windows, WikiText-2      hub.py           data sets of the Hugging Face hub
glue.py         the tasks of GLUE, a row of a table each     reviews.py        sentences good or bad, from a seed
arithmetic.py   several sets of word problems, and overlaps
long_text.py    many documents as one stream of token ids
alpaca.py       Alpaca's instructions, in its prompt format
pretrain_text.py  text to pre-train a tiny model on
"""

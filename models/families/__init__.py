"""The model families: what a family calls its modules, one row of FAMILIES (models/patch.py) each.

llama.py        LLaMA                                        mistral.py        Mistral, with its sliding window
"""

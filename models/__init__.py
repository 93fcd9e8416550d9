"""How a Hugging Face model is patched: the public API's config.py and patch.py, and what they put in place.

blocks.py      a norm, an attention and an MLP module of a layer        layers.py   a whole layer, and checkpointing
head.py        LM head and loss                                         masks.py    which tokens see which
step_hook.py   before each training forward                             bits.py     q_bit=auto
trust.py       which modules a block may stand in for                   watch.py    whether they still are the same
readers.py     who looks at what is computed                            outputs.py  what a training forward returns
late_logits.py logits when somebody looks at them                       foreign_head.py  a head of TRL's
binding.py     how a block is put in front of a forward                 state.py    calibration on disk
calibration.py when calibration ends, and begins again                  graphs/     all layers as CUDA graphs
report.py      what is said about a patched model                       families/   the names of LLaMA, Mistral, Qwen
"""

import logging

# PEFT imports bitsandbytes, which warns on every CPU machine that an optional kernel package is missing
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

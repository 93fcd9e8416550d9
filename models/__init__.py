"""How a Hugging Face model is patched: the public API's config.py and patch.py, and what they put in place.

blocks.py      a norm, an attention and an MLP module of a layer        layers.py   a whole layer, or its input alone
head.py        LM head and loss                                         masks.py    which tokens see which
step_hook.py   around each training forward                             bits.py     q_bit=auto
stream.py      a padded batch as one row of its real tokens             no_cache.py  what stands for a cache
trust.py       which modules a block may stand in for                   watch.py    whether they still are the same
outputs.py     what a training forward returns                          late_logits.py  logits, if somebody looks
binding.py     how a block is put in front of a forward                 foreign_head.py  heads that are not ours
calibration.py when calibration ends, and begins again                  state.py    calibration on disk
callback.py    calibration in the checkpoints of HF's Trainer
report.py      what is said about a patched model                       graphs/     all layers as CUDA graphs
building.py    which blocks and savers layers get                       families/   what families are like
sharding.py    what fully_shard (FSDP2) makes of modules               host_embedding.py  embeddings in host memory
encoder_layer.py  a whole layer whose norms come after the residual      shifted.py  attention in shifted groups
verify.py      gradients beside exact LoRA's                            verification.py  what was found of them
finite.py      no step on gradients that are not finite                 origin.py   where these come from
switches.py    what a backward has to find as it was
"""

"""What several tests share.

small_models.py    PEFT models and batches, their gradients  kernel_checks.py  error against float64 truth
counting.py        bytes alive, and kept for backward        replaying.py      CUDA graphs, without a GPU
offloading.py      a store whose copies come late            small_tokenizers.py  folders with a tokenizer only
compile_kernels.py every kernel compiled for a GPU, without one
interpreter.py     Triton's interpreter, three times as fast
calibrating.py     rows to calibrate on, usual and poor  ranks.py         two processes on a CPU
drivers.py         every driver's command line           small_roberta.py  an encoder's folder
commands.py        a command's process played by the test's own
forked.py          processes that need not import       fixtures.py       what several test files ask for
fuzzing.py         hostile options, rows and model folders
"""

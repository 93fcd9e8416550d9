"""What several tests share.

small_models.py    PEFT models and batches, their gradients  kernel_checks.py  error against float64 truth
offloading.py      a store whose copies come late            replaying.py      CUDA graphs, without a GPU
compile_kernels.py every kernel compiled for a GPU, without one
"""

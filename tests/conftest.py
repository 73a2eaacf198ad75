"""What must be set before any test imports torch."""

import os

# Before torch is imported, here and in the processes that tests start: the tensors of tests are small, and several
# threads a process wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which PyTorch may do before the tests of the kernels: they run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

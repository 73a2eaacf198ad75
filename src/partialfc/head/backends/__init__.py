"""Implementations of the two passes over the sampled classes, and the choice among them.

From the bottom: `tile_sizes` (plain numbers); `base` (the protocol, its inputs and results);
`torch_chunked` (the reference, and the fallback), `cpu` on `cpu_kernels` (numba), `gpu` on `gpu_kernels` (Triton);
`select` picks one for each step.
"""

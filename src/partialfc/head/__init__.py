"""The head: the sharded and sampled margin softmax, its optimizers, and the backends that compute it.

From the bottom: `margins/`; `loss` (the formulas); `sampling` (sampled classes, initial centers); `backends/` (the two
passes over the sampled classes); `rows` (the state that head and optimizer share, and row storage); `inputs` (checks,
labels of all ranks); `lazy_sgd` and `optim` (the optimizers); `partial_fc` (the module).
"""

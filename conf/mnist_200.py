"""The paper's smallest width on a CPU: CONV-3-200 on MNIST in bfloat16, about three hours of two cores (docs/figure1.md)."""

epochs = 20
precision = 'bf16'
eval_every = 4

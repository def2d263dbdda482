"""The paper's smallest width on a CPU: CONV-3-200 on MNIST in bfloat16 (docs/figure1.md)."""

epochs = 16
precision = 'bf16'
eval_every = 4

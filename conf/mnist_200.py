"""The paper's smallest width on a CPU: CONV-3-200 on MNIST in bfloat16, an hour and a half of one core (docs/figure1.md)."""

epochs = 8
precision = 'bf16'
eval_every = 4

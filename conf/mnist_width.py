"""Figure 1 by width: CONV-3-8 to CONV-3-32 on MNIST, about three hours (docs/figure1.md)."""

width = [8, 16, 32]
epochs = 100
eval_every = 2
layers_every = 25
certify_every = 10

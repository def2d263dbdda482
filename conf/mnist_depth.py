"""Figure 1 by depth: CONV-2-16 to CONV-5-16 on MNIST, about three hours (docs/figure1.md)."""

depth = [2, 3, 4, 5]
width = 16
epochs = 100
eval_every = 2
layers_every = 25
certify_every = 10

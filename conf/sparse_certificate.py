"""Certificates against density: CONV-3-16 and CONV-3-32 on MNIST, their convolutions pruned to 1 % (docs/certificate.md)."""

width = [16, 32]
epochs = 5
milestones = [4]
prune_rounds = 4
prune_fraction = 0.6838  # 1 - 10^(-1/2): two rounds leave a tenth
prune_layers = 'conv'
prune_allocation = 'layer'
rewind_epoch = -1
eval_every = 5
layers_every = 5

"""Certificates of pruned networks: CONV-3-16 and CONV-3-32 on MNIST (docs/certificate.md)."""

width = [16, 32]
epochs = 10
milestones = [8]
prune_score = 'path'
prune_rounds = 6
prune_fraction = 0.5
prune_layers = 'conv'
rewind_epoch = 2
eval_every = 5
layers_every = 10
certify_every = 10

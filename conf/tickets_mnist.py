"""Lottery tickets by three scores: CONV-3-16 on MNIST (docs/sparse.md)."""

width = 16
epochs = 10
milestones = [8]
prune_score = ['magnitude', 'path', 'random']
prune_rounds = 6
prune_fraction = 0.5
prune_layers = 'conv'
rewind_epoch = 2
eval_every = 5
layers_every = 10
certify_every = 10

"""Lottery tickets: CONV-3-16 on the digits, pruned by magnitude to 5.5 % of its weights."""

dataset_name = 'digits'
width = 16
epochs = 100  # of each of the 14 trainings
milestones = [70, 90]
prune_rounds = 13
layers_every = 100

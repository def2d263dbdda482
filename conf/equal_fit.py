"""Do sparse networks generalize worse at equal fit? Masks against tickets (docs/ranking.md)."""

depth = [1, 2]
width = 64
kernel_size = 3
stride = 2
padding = 1
normalization = 'none'
train_samples = [500, 2000]
density = [0.125, 0.25, 0.5]
initial_mask = ['random', 'erk']
loss = 'CE'
target_loss = 0.01
epochs = 300  # at most
lr = 0.05
milestones = []
weight_decay = 0.0
seed = [0, 1, 2]
eval_every = 1000  # at the start and at the end alone
measures_every = 1000
threads = 1

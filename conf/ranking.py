"""Which bound predicts? 288 networks on MNIST at the same training loss (docs/ranking.md)."""

depth = [1, 2, 3]
width = [24, 64]
kernel_size = 3
stride = 2
padding = 1
normalization = 'none'
train_samples = [200, 800]
label_noise = [0.0, 0.1]
density = [0.3, 1.0]
initial_mask = 'erk'
loss = 'CE'
target_loss = 0.01
epochs = 300  # at most
batch_size = [16, 128]
lr = 0.05
milestones = []
weight_decay = 0.0
seed = [0, 1, 2]
eval_every = 1000  # at the start and at the end alone
measures_every = 1000
threads = 1
jobs = 2

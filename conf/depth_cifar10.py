"""Figure 1 of Galanti, Galanti and Ben-Shaul (TMLR 2023): CONVBN-L-400 on CIFAR10, on a GPU.

Its README has a rate of 0.1, times 0.1 after epochs 60, 120 and 160 of 500, the defaults here. Its
code, at the jumps of that figure's curves, has other steps: times 0.2 from epochs 60, 100 and 200
on. It steps its scheduler before an epoch, and a milestone here is the last epoch at the rate
before, so those are `milestones = [59, 99, 199]` and `lr_decay = 0.2`.
"""

dataset_name = 'CIFAR10'
normalize = True
augment = 'crop'
network = 'CONVBN'
depth = [3, 5, 8, 12, 16, 20]
width = 400
normalization = 'batch'
bias = True
loss = 'CE'
batch_size = 128
lr = 0.1
weight_decay = 5e-4
eval_every = 10
layers_every = 10

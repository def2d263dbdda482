"""The first figure of Galanti, Galanti and Ben-Shaul (TMLR 2023): CONVBN-L-400 on CIFAR10. It wants a GPU.

The learning rate falls where the curves of that figure jump, by the factor of its released code; without augmentation.
That code steps its scheduler before an epoch, so that with its milestones 60, 100 and 200 these epochs are the first at
the lower rate; here a milestone is the last epoch at the rate before.
"""

dataset_name = 'CIFAR10'
normalize = True
network = 'CONVBN'
depth = [3, 5, 8, 12, 16, 20]
width = 400
normalization = 'batch'
bias = True
loss = 'CE'
batch_size = 128
lr = 0.1
milestones = [59, 99, 199]
lr_decay = 0.2
weight_decay = 5e-4
eval_every = 10
layers_every = 10

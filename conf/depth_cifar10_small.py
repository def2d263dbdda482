"""conf/depth_cifar10.py in about two hours of two CPU cores: CONVBN-L-32, a fifth of its epochs.

The milestones are a fifth of those of the released code, too; batches are cropped and mirrored as
there, where they are also rotated. A network that does not fit the training set has no effective
depth at a small eps: read it beside the training accuracy.
"""

dataset_name = 'CIFAR10'
normalize = True
augment = 'crop'
network = 'CONVBN'
depth = [3, 5, 8, 12]
width = 32
normalization = 'batch'
bias = True
loss = 'CE'
epochs = 100
batch_size = 128
lr = 0.1
milestones = [12, 20, 40]
lr_decay = 0.2
weight_decay = 5e-4
eval_every = 10
layers_every = 10
jobs = 2

# The settings of this launch; python train.py --settings with this file repeats it.
# date: 2026-11-20T10:28:12+00:00
# versions: Python 3.11.7, torch 2.13.0+cpu
# device: cpu, 2 threads
# commit: 5e6403be0f72b135196c7fa3ea4f65791a9d033e

dataset_name = 'MNIST'  # MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100 or digits
data_dir = 'data'  # where the dataset is looked for and downloaded to; the environment variable DATA_DIR wins
normalize = False  # False: pixels in [0, 1]; True: standardized with the training set's mean and std per channel
network = 'CONV'  # an entry of models/__init__.py; CONV is the paper's CONV-L-H
depth = [2, 3, 4, 5]  # L, the number of hidden convolutions
width = 16  # H, the channels of each of them
kernel_size = 2  # of every convolution
stride = 1  # of every convolution
padding = 0  # of every convolution
bias = False  # the bounds are theorems about bias-free networks, and a network with biases is refused
loss = 'MSE'  # MSE or L1 (means over samples and one-hot outputs) or CE
epochs = 100  # passes over the training set
batch_size = 32  # the last, smaller batch of an epoch is used too
lr = 0.01  # learning rate of the first epochs
milestones = [60, 120, 160]  # epochs after which the learning rate is multiplied by lr_decay
lr_decay = 0.1  # factor of each learning-rate decay
momentum = 0.9  # of SGD
weight_decay = 0.003  # on every parameter, the scalars of weight normalization too
early_stop_epoch = 0  # from this epoch on, stop a run that does not learn; 0: never
early_stop_accuracy = 0.5  # ... when the training accuracy was below this at the last three evaluations
seed = 0  # of the initialization and of the shuffles
device = 'auto'  # auto (CUDA, then CPU), cpu, cuda or cuda:1
precision = 'auto'  # of training: float32, tf32 or bf16; auto is tf32 on CUDA and float32 on CPU
delta = 0.001  # the bounds hold with probability at least 1 - delta
gamma = 1.0  # margin
eval_every = 1  # epochs between evaluations; the last epoch is always evaluated
checkpoint_every = 1  # epochs between checkpoints; an interrupt and the last epoch always leave one
results_dir = 'results'  # each launch makes a numbered folder in here

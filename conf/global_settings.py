"""Every knob of the experiment, with the values of the paper's CONV-L-H experiments on MNIST.

Any knob but the folders, `milestones`, `device`, `threads` and `jobs` may be a list: `depth = [3, 4, 5]`,
`width = [200, 600, 1000]` trains the nine networks of the product. Every knob is also a flag of train.py, which wins over
this file.
"""

# Data
dataset_name = 'MNIST'  # MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100 or digits
data_dir = 'data'  # where the dataset is looked for and downloaded to; the environment variable DATA_DIR wins
normalize = False  # False: pixels in [0, 1]; True: standardized with the training set's mean and std per channel
train_samples = 0  # train on the first so many of a permutation that data_seed draws; 0: on all, in the file's order
label_noise = 0.0  # share of the training labels made wrong, each by another class
clean_samples = (
    0  # so many first training samples keep their labels; label_noise is then a share of the others
)
data_seed = 0  # of the choice of training samples and of the wrong labels
augment = (
    'none'  # crop: images that are trained on are shifted by up to 4 pixels and mirrored, by chance
)

# Network
network = (
    'CONV'  # CONV (the paper's CONV-L-H), MLP, CONVBN or CONVRES: an entry of models/__init__.py
)
depth = 3  # L, the number of hidden convolutions
width = 200  # H, the channels of each of them
kernel_size = 2  # of every convolution of CONV
stride = 1  # of every convolution of CONV
padding = 0  # of every convolution of CONV
normalization = 'weight'  # of every layer but the classifier: weight, batch or none; CONVBN and CONVRES want batch
bias = False  # True: a bias in every layer; the bounds that do not cover biases then stay empty

# Training
loss = 'MSE'  # MSE or L1 (means over samples and one-hot outputs) or CE
epochs = 500  # passes over the training set
batch_size = 32  # the last, smaller batch of an epoch is used too
lr = 0.01  # learning rate of the first epochs
milestones = [60, 120, 160]  # epochs after which the learning rate is multiplied by lr_decay
lr_decay = 0.1  # factor of each learning-rate decay
momentum = 0.9  # of SGD
weight_decay = 3e-3  # on every parameter, the scalars of weight normalization too
target_loss = 0.0  # end a training, or each round, at this training loss, as evaluated over the whole training set; 0: never
early_stop_epoch = 0  # from this epoch on, stop a run that does not learn; 0: never
early_stop_accuracy = (
    0.5  # ... when the training accuracy was below this at the last three evaluations
)
seed = 0  # of the initialization and of the shuffles

# Sparsity
density = 1.0  # share of the weights that live from the start; below 1 wants an initial_mask
initial_mask = 'none'  # how they are chosen: none, random, erk, snip or synflow
prune_rounds = 0  # so many times after a training: prune, rewind what is left, and train again
prune_score = (
    'magnitude'  # which weights go: those of least magnitude, path (path-magnitude) or random score
)
prune_fraction = 0.2  # share of the living weights that goes in each round
prune_layers = 'all'  # all, or conv: the classifier stays dense
prune_allocation = 'global'  # one threshold for all layers, or layer: the same share of each
rewind_epoch = 0  # what is left goes back to its values after this epoch; -1: stays as trained
rescale_neurons = (
    False  # take scores on a copy whose neurons are rescaled by 1, 128 or 4096: the same function
)
regrow = 'none'  # dynamic sparsity: random (SET) or gradient (RigL) regrowth of as many weights as are dropped
regrow_every = 100  # steps between updates of the masks
regrow_fraction = (
    0.3  # share of a layer's living weights that the first update drops; it falls as a cosine
)
regrow_until = 0.75  # share of the training's steps after which the masks stay
channel_sparsity = 0.0  # with regrow: share of the hidden channels that die by regrow_until (Chase)

# Machine
device = 'auto'  # auto (CUDA, then CPU), cpu, cuda or cuda:1
precision = 'auto'  # of training: float32, tf32 or bf16; auto is tf32 on CUDA and float32 on CPU
threads = 0  # of the CPU; 0: torch's choice, which the launch writes down, since the last digits depend on it
jobs = 1  # networks of a sweep trained side by side, each in a process of its own

# Bounds
delta = 0.001  # the bounds hold with probability at least 1 - delta
gamma = 1.0  # margin

# Logging
eval_every = 1  # epochs between evaluations; the last epoch is always evaluated
certify_every = 0  # epochs between PAC-Bayes certificates, and at the last one; 0: never
measures_every = (
    0  # epochs between sharpness, distances and the like, and at the last one; 0: never
)
layers_every = 0  # epochs between rows of layers.csv, and at the last one; 0: never
snapshot_every = (
    0  # epochs between copies of the weights that are kept, for studies.evaluate; 0: none
)
results_dir = 'results'  # each launch makes a numbered folder in here

# The settings of this launch, which python train.py --settings results/mnist-200-decays/global_settings.py repeats.
# date: 2026-11-30T14:48:00+00:00
# versions: Python 3.11.7, torch 2.13.0+cpu
# device: cpu, AMD EPYC 25-17-1, AVX512
# commit: 404a52928bf0f1bfbf04116f4670534d3a54fc8e

dataset_name = 'MNIST'  # MNIST, FashionMNIST, SVHN, CIFAR10, CIFAR100 or digits
data_dir = 'data'  # folder of the datasets; the environment variable DATA_DIR wins
normalize = False  # False: pixels in [0, 1]; True: standardized per channel
train_samples = 0  # training-set size: a random subset drawn with data_seed; 0: all
label_noise = 0.0  # share of the training labels replaced by another class
clean_samples = 0  # leading samples that keep their labels; label_noise applies to the rest
data_seed = 0  # seed of the subset and of the wrong labels
augment = 'none'  # crop: training images are randomly shifted by up to 4 pixels and mirrored
network = 'CONV'  # CONV (the paper's CONV-L-H), MLP, CONVBN or CONVRES
depth = 3  # L, the number of hidden convolutions
width = 200  # H, the number of channels of each of them
kernel_size = 2  # of every convolution, CONV only
stride = 1  # of every convolution, CONV only
padding = 0  # of every convolution, CONV only
normalization = 'weight'  # weight, batch or none, in every layer but the classifier
bias = False  # True: a bias in every layer, which most bounds do not cover
loss = 'MSE'  # MSE or L1 (means over samples and one-hot outputs) or CE
epochs = 15  # passes over the training set
batch_size = 32  # the smaller last batch of an epoch is used too
lr = 0.01  # initial learning rate
milestones = [8, 12, 14]  # epochs after which the learning rate is multiplied by lr_decay
lr_decay = 0.1  # factor of each learning-rate decay
momentum = 0.9  # of SGD
weight_decay = 0.003  # on every parameter, the scalars of weight normalization too
target_loss = 0.0  # stop a training, or each round, at this training loss; 0: never
early_stop_epoch = 0  # from this epoch on, stop a run that does not learn; 0: never
early_stop_accuracy = 0.5  # ... if the last three training accuracies are below this
seed = 0  # of the initialization and of the shuffles
density = 1.0  # share of nonzero weights from the start; below 1 needs an initial_mask
initial_mask = 'none'  # how they are chosen: none, random, erk, snip or synflow
prune_rounds = 0  # number of rounds after a training: prune, rewind, train again
prune_score = 'magnitude'  # prune the lowest magnitude, path (magnitude) or random score
prune_fraction = 0.2  # share of the remaining weights pruned in each round
prune_layers = 'all'  # all, or conv: the classifier stays dense
prune_allocation = 'global'  # one threshold for all layers, or layer: the same share of each
rewind_epoch = 0  # epoch to rewind surviving weights to; -1: fine-tune
rescale_neurons = False  # score a copy with rescaled neurons (the same function): a control
regrow = 'none'  # dynamic sparsity: random (SET) or gradient (RigL) regrowth
regrow_every = 100  # steps between updates of the masks
regrow_fraction = 0.3  # share of a layer's weights dropped by the first update; cosine decay
regrow_until = 0.75  # share of the training's steps after which the masks stay
channel_sparsity = 0.0  # with regrow: share of hidden channels removed by regrow_until (Chase)
device = 'auto'  # auto (CUDA, then CPU), cpu, cuda or cuda:1
precision = 'float32'  # of training: float32, tf32 or bf16; auto: tf32 on CUDA, float32 on a CPU
threads = 2  # CPU threads; 0: torch's choice, which the launch writes down
jobs = 1  # networks of a sweep trained at the same time, each in its own process
delta = 0.001  # the bounds hold with probability at least 1 - delta
gamma = 1.0  # margin at which the bounds count training errors
eval_every = 4  # epochs between evaluations; the last epoch is always evaluated
certify_every = 0  # epochs between PAC-Bayes certificates, and the last one; 0: never
measures_every = 0  # epochs between sharpness, distances, ..., and the last one; 0: never
layers_every = 0  # epochs between rows of layers.csv, and the last one; 0: never
snapshot_every = 0  # epochs between copies of the weights for studies.evaluate; 0: never
results_dir = 'results'  # each launch makes a numbered folder in here

"""How many training images reach a test error, at each density: CONV-3-32 on subsets of MNIST.

A launch has one train_samples, and epochs is 24,000 over it, so that more images do not mean more
training as well: a round of 500, 1000, 2000 or 4000 images has 768, 768, 756 or 750 steps, since an
epoch's last batch is smaller. docs/samples.md has the loop over launches, which
`python -m studies.samples` reads.
"""

train_samples = 2000
data_seed = [0, 1, 2]
width = 32
stride = 2
lr = 0.3
weight_decay = 1e-4
epochs = 12
milestones = [9]
prune_rounds = 3
prune_fraction = 0.6
eval_every = 12
certify_every = 0

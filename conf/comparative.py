"""The comparative bound as an experiment (docs/depth.md): ten draws of S1 and S2.

A run of 600 training samples is trained on S1, since all of them stay clean; one of 1,200 is
trained on the same S1 and on S2, where a share label_noise of the labels is wrong. data_seed
draws S1 and S2, seed the initialization. `python -m studies.comparative` reads the results.
"""

dataset_name = 'digits'
train_samples = [600, 1200]
clean_samples = 600
label_noise = 0.1
data_seed = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
seed = [0, 1]
network = 'MLP'
depth = 8
width = 100
normalization = 'batch'
bias = True
loss = 'CE'
epochs = 200
batch_size = 128
lr = 0.1
milestones = [100, 150, 180]
weight_decay = 5e-4
eval_every = 200
layers_every = 200

"""What each layer has learned: MLPs on the digits with wrong labels (docs/depth.md)."""

dataset_name = 'digits'
network = 'MLP'
depth = [4, 8, 12]
width = 100
normalization = 'batch'
bias = True
label_noise = [0.0, 0.1, 0.3, 0.5]
loss = 'CE'
epochs = 400
batch_size = 128
lr = 0.1
milestones = [200, 300, 360]
weight_decay = 5e-4
eval_every = 10
layers_every = 10

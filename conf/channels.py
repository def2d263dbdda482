"""Channels that die while a sparse network trains: CONV-3-32 on the digits with SET and RigL.

docs/topology.md says what it shows, `python -m studies.channels` draws it.
"""

dataset_name = 'digits'
width = 32
lr = 0.1
epochs = 40
milestones = [30]
density = 0.2
initial_mask = 'erk'
regrow = ['random', 'gradient']
regrow_every = 20
channel_sparsity = [0.0, 0.3, 0.5, 0.7]
seed = [0, 1, 2]
eval_every = 40
layers_every = 2
certify_every = 0

"""The quick start: the same experiment on the bundled 8x8 digits, in under a minute on a laptop's CPU."""

dataset_name = 'digits'
width = 32
epochs = 150
milestones = [100, 130]

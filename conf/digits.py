"""The quick start: the same experiment on the bundled 8x8 digits, in under a minute on a laptop's CPU."""

dataset_name = 'digits'
width = 32
epochs = 60
milestones = [40, 50]

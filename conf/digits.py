"""The quick start: the same experiment on the bundled 8x8 digits, in about a minute."""

dataset_name = 'digits'
width = 32
epochs = 150
milestones = [100, 130]

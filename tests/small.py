"""The settings of the tests: a network of the digits that trains in a second."""

dataset_name = 'digits'
width = 4
epochs = 6
certify_every = 0

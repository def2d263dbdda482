"""A certificate for each trained network: the paper's recipe on MNIST, a few channels wide, half an hour of one core."""

depth = [1, 2, 3]
width = 8
epochs = 10
certify_every = 2

"""Certificates during training: CONV-L-8 on MNIST by the paper's recipe, half an hour of a core."""

depth = [1, 2, 3]
width = 8
epochs = 10
certify_every = 2

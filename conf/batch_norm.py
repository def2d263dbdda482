"""CONV-3-16 on MNIST with batch normalization, for certificate E (docs/certificate.md)."""

width = 16
normalization = 'batch'
epochs = 10
milestones = [6, 8]
eval_every = 10

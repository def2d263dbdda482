"""The paper's experiment on MNIST in five minutes of a laptop's CPU: CONV-3-16, the learning rate's decays to match."""

width = 16
epochs = 10
milestones = [6, 8]

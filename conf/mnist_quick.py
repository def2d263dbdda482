"""The paper's experiment in five minutes: CONV-3-16 on MNIST, with earlier decays."""

width = 16
epochs = 10
milestones = [6, 8]

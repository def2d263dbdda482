"""CONV-3-200 through the paper's three decays of the learning rate, earlier than in its table.

The paper's table has them after epochs 60, 120 and 160 of 500 (docs/figure1.md).
"""

epochs = 20
milestones = [5, 15, 18]
precision = 'float32'
eval_every = 5

"""CONV-3-200 through the paper's three decays of the learning rate, earlier than in its table.

The paper's table has them after epochs 60, 120 and 160 of 500 (docs/figure1.md).
"""

epochs = 15
milestones = [8, 12, 14]
precision = 'float32'
eval_every = 4

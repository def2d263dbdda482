"""The recipe of the paper's released code, where it differs from the table (docs/released_code.md).

Its scheduler is stepped before an epoch, so that its decays at 60, 100 and 300 act one epoch
earlier than milestones here.
"""

normalize = True  # there: mean 0.1307, std 0.3081
width = 600
bias = True  # the released code evaluates its bounds as if there were none
epochs = 510
milestones = [59, 99, 299]
lr_decay = 0.2
momentum = 0
weight_decay = 8e-4
early_stop_epoch = 51
early_stop_accuracy = 0.15
eval_every = 10

"""A certificate at the paper's own width: CONV-3-200 on MNIST, its wide convolutions pruned.

OMP_NUM_THREADS=1 python -m studies.paper_width        half an hour of a core with bfloat16
OMP_NUM_THREADS=1 python -m studies.paper_width 32     the same at another width, in minutes

Three times: prunes the second and the third convolution by magnitude, drops the channels that died,
which leaves the function as it is, and trains the rest. The full width is certified: the dropped
channels are put back as zeros (docs/certificate.md).
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from conf import load_settings, run_program
from device import keep_freed_memory
from evaluation import rounded_up
from measures.norms import classification_margins, margin_error
from measures.pac_bayes import certify, live_channels
from measures.trace import outputs, plain_layer, trace_layers
from models import get_network
from models.layers import hidden_layer
from models.weight_norm import Mask, set_mask
from records import load_data
from sparsify import best_masks
from studies.report import study_parser

# Weights kept of the second and of the third convolution, None for all; each epoch's learning rate.
STAGES = [
    (None, [0.01]),
    (1120, [0.01, 0.01]),
    (480, [0.01, 0.01]),
    (160, [0.01, 0.01, 0.01, 0.001]),
]
SETTINGS = {
    'network': 'CONV',
    'depth': 3,
    'kernel_size': 2,
    'stride': 1,
    'padding': 0,
    'normalization': 'weight',
    'bias': False,
    'dataset_name': 'MNIST',
    'normalize': False,
    'train_samples': 0,
    'label_noise': 0.0,
}


def kernels_of(net, input_shape):
    return [layer.kernel.float() for layer in trace_layers(net, input_shape)]


def chain(kernels, masks):
    """The network of these kernels, weight-normalized; with masks, zeros stay zero in training."""
    layers = []
    for kernel in kernels[:-1]:
        layer = plain_layer(kernel.clone())
        layers += hidden_layer(layer, 'weight')
        if masks:
            parametrize.register_parametrization(layer, 'weight', Mask(layer.weight))
            set_mask(layer, kernel != 0)
    classifier = plain_layer(kernels[-1].flatten(1).clone())
    net = nn.Sequential(*layers, nn.Flatten(), classifier)
    return net.to(kernels[0].device, memory_format=torch.channels_last)


def pruned(kernels, count):
    """The `count` largest weights of each wide convolution, without the channels that died."""
    kernels = list(kernels)
    for l in range(1, len(kernels) - 1):
        (mask,) = best_masks([kernels[l].abs()], [kernels[l] != 0], count)
        kernels[l] = torch.where(mask, kernels[l], 0)
    return live_channels(kernels)


def widened(kernels, width):
    """The same function with hidden layers of `width` channels, the added ones zero."""
    wide, inputs = [], kernels[0].shape[1]
    for kernel in kernels:
        width = width if kernel is not kernels[-1] else len(kernel)
        missing = inputs - kernel.shape[1], width - len(kernel)
        wide.append(F.pad(kernel, (0, 0, 0, 0, 0, missing[0], 0, missing[1])))
        inputs = width
    return wide


def train_epoch(net, optimizer, settings, dataset, epoch):
    images, labels = dataset.train_images, dataset.train_labels
    targets = F.one_hot(labels, dataset.num_classes).float()
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(images))
    batches = torch.from_numpy(order).to(images.device).split(settings.batch_size)
    for indices in tqdm(batches, desc=f'epoch {epoch}', disable=None):
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            scores = net(images[indices])
        F.mse_loss(scores.float(), targets[indices]).backward()
        optimizer.step()


def main(argv=None):
    parser = study_parser('paper_width', __doc__)
    parser.add_argument('width', type=int, nargs='?', default=200)
    width = parser.parse_args(argv).width
    keep_freed_memory()
    (settings,) = load_settings(flags=SETTINGS | {'width': width})[1]
    dataset = load_data(settings)
    images, labels, shape = dataset.train_images, dataset.train_labels, dataset.input_shape
    torch.manual_seed(settings.seed)
    net = get_network(settings, shape, dataset.num_classes).to(images.device)
    kernels, epoch = kernels_of(net, shape), 0
    for count, rates in STAGES:
        if count:
            kernels = pruned(kernels, count)
        net = chain(kernels, masks=bool(count))
        momentum, decay = settings.momentum, settings.weight_decay
        optimizer = torch.optim.SGD(net.parameters(), momentum=momentum, weight_decay=decay)
        for rate in rates:
            epoch += 1
            optimizer.param_groups[0]['lr'] = rate
            train_epoch(net, optimizer, settings, dataset, epoch)
        kernels = kernels_of(net, shape)
        margins = classification_margins(outputs(net, dataset.test_images), dataset.test_labels)
        channels = ', '.join(str(len(kernel)) for kernel in kernels[:-1])
        words = [f'{count or "all"} weights of each, channels {channels}']
        words.append(f'test_error {margin_error(margins, 0):.4f}')
        if count:
            wide = chain(widened(kernels, width), masks=False)
            found = certify(wide, images, labels, settings.delta)
            words += [f'{column} {rounded_up(bound):.4f}' for column, bound in found.items()]
        print(', '.join(words), flush=True)


if __name__ == '__main__':
    sys.exit(run_program(main))

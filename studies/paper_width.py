"""A certificate at the paper's own width: CONV-3-200 on MNIST with a thousandth of its wide convolutions (docs/certificate.md).

OMP_NUM_THREADS=1 python docs/paper_width.py        about half an hour of one core that has bfloat16
OMP_NUM_THREADS=1 python docs/paper_width.py 32     the same at another width, in minutes

Trains, prunes the second and the third convolution by magnitude, drops the channels that died, which leaves the function as
it is, and trains what is left, three times. What is certified is of the full width: the dropped channels are back, as zeros.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from conf import load_settings
from device import keep_freed_memory
from evaluation import losses_and_margins, rounded_up
from records import load_data
from measures.norms import margin_error
from measures.pac_bayes import certify, live_channels
from measures.trace import plain_layer, trace_layers
from models import get_network
from models.layers import hidden_layer
from models.weight_norm import Mask, set_mask
from sparsify import best_masks

STAGES = [  # weights of the second and of the third convolution that stay, None for all; then the learning rate of each epoch
    (None, [0.01]),
    (1120, [0.01, 0.01]),
    (480, [0.01, 0.01]),
    (160, [0.01, 0.01, 0.01, 0.001]),
]


def kernels_of(net, input_shape):
    return [layer.kernel.float() for layer in trace_layers(net, input_shape)]


def chain(kernels, masks):
    """The network of these kernels, weight-normalized as the paper's; with masks, what is 0 stays 0."""
    layers = []
    for kernel in kernels[:-1]:
        layer = plain_layer(kernel.clone())
        layers += hidden_layer(layer, 'weight')
        if masks:
            parametrize.register_parametrization(layer, 'weight', Mask(layer.weight))
            set_mask(layer, kernel != 0)
    classifier = plain_layer(kernels[-1].flatten(1).clone())
    return nn.Sequential(*layers, nn.Flatten(), classifier).to(
        kernels[0].device, memory_format=torch.channels_last
    )


def pruned(kernels, count):
    """The kernels with so many of the largest weights of each wide convolution, without the channels that then are dead."""
    kernels = list(kernels)
    for place in range(1, len(kernels) - 1):
        (mask,) = best_masks([kernels[place].abs()], [kernels[place] != 0], count)
        kernels[place] = torch.where(mask, kernels[place], 0)
    return live_channels(kernels)


def widened(kernels, width):
    """The same function with hidden layers of `width` channels, those that are added zeros."""
    wide = [
        (width, kernels[0].shape[1]),
        *((width, width) for _ in kernels[1:-1]),
        (len(kernels[-1]), width),
    ]
    return [
        F.pad(kernel, (0, 0, 0, 0, 0, inputs - kernel.shape[1], 0, outputs - kernel.shape[0]))
        for kernel, (outputs, inputs) in zip(kernels, wide)
    ]


def main():
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    paper = dict(
        network='CONV',
        depth=3,
        width=width,
        kernel_size=2,
        stride=1,
        padding=0,
        normalization='weight',
        bias=False,
    )
    paper |= dict(dataset_name='MNIST', normalize=False, train_samples=0, label_noise=0.0)
    (settings,) = load_settings(flags=paper)[1]
    device, dataset = get_inputs(settings)
    keep_freed_memory()
    images, labels, shape = dataset.train_images, dataset.train_labels, dataset.input_shape
    targets = F.one_hot(labels, dataset.num_classes).float()
    torch.manual_seed(settings.seed)
    kernels = kernels_of(get_network(settings, shape, dataset.num_classes).to(device), shape)
    number = 0
    for count, rates in STAGES:
        net = chain(pruned(kernels, count), masks=True) if count else chain(kernels, masks=False)
        optimizer = torch.optim.SGD(
            net.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        for rate in rates:
            optimizer.param_groups[0]['lr'] = rate
            number += 1
            order = torch.from_numpy(
                np.random.default_rng((settings.seed, number)).permutation(len(images))
            ).to(device)
            for indices in tqdm(
                order.split(settings.batch_size),
                desc=f'epoch {number}',
                disable=not sys.stdout.isatty(),
            ):
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16):
                    outputs = net(images[indices])
                F.mse_loss(outputs.float(), targets[indices]).backward()
                optimizer.step()
        kernels = kernels_of(net, shape)
        with torch.no_grad():
            error = margin_error(
                losses_and_margins(net, dataset.test_images, dataset.test_labels, F.mse_loss)[1], 0
            )
        wide = chain(widened(kernels, width), masks=False)
        found = certify(wide, images, labels, settings.delta) if count else {}
        channels = ', '.join(str(len(kernel)) for kernel in kernels[:-1])
        words = ' '.join(f'{column} {rounded_up(value):.4f}' for column, value in found.items())
        print(
            f'{count or "all"} weights left of each, channels {channels}, test_error {error:.4f} {words}',
            flush=True,
        )


if __name__ == '__main__':
    main()

"""What is measured at an evaluation, and when: the schedule of a run, losses and errors, a row of each table, its columns."""

import time

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from measures.geometry import activations, not_covered
from measures.masks import density, measure_masks, sharing
from measures.norms import classification_margins, margin_error
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.pac_bayes import certify, test_set_bound
from measures.representations import measure_representations
from utils import BOUNDS, evaluate_bounds

LOSSES = {'MSE': F.mse_loss, 'CE': F.cross_entropy, 'L1': F.l1_loss}  # of outputs and one-hot targets


COLUMNS = (
    'epoch, round, density, lr, train_loss, test_loss, train_error, test_error, generalization_gap, train_margin_error, rho, '
    f'prod_ratio, norm_ratio, path_norm, {", ".join([*BOUNDS, *CERTIFICATES])}, test_set_bound, train_seconds, eval_seconds'
).split(', ')
LAYER_COLUMNS = (
    'epoch, round, layer, size, train_ncc_error, test_ncc_error, train_cdnv, test_cdnv, density, dead_channels, active, '
    'participation, ramanujan_gap, imdb, weighted_gap'
).split(', ')


class Diverged(Exception):
    """The loss or a weight became NaN or infinite."""


def learning_rate(settings, epoch):
    """The learning rate of an epoch, counted from 1: times lr_decay after each milestone."""
    return settings.lr * settings.lr_decay ** sum(epoch > milestone for milestone in settings.milestones)


def due(epoch, every, last=None):
    """Whether something that is done every so many epochs, and after the last one, is due after this one; 0 is never."""
    return every > 0 and (epoch % every == 0 or epoch == last)


def no_certificate(settings):
    """Why the training samples are not as a certificate asks for, iid and at least 10; None where they are."""
    if settings.normalize:
        return 'normalize = True takes the statistics of the whole training set'
    if settings.label_noise:
        return 'with label_noise the training samples are not independent'
    if 0 < settings.train_samples < 10:
        return f'train_samples = {settings.train_samples}, and at least 10 are needed'


def batch_of_evaluation(net, images):
    """Images per forward pass: on a CPU few enough that activations stay in its cache, else many."""
    if images.device.type == 'cpu':
        return 32
    return max(1, min(1000, 2**28 // max(activations(net, images[:1]))))


def losses_and_margins(net, images, labels, loss):
    """The mean loss and the margins (m,) of a network on a whole set."""
    outputs = []
    with parametrize.cached():
        for batch in images.split(batch_of_evaluation(net, images)):
            outputs.append(net(batch))
    outputs = torch.cat(outputs).double()
    targets = F.one_hot(labels, outputs.shape[1]).double()
    return loss(outputs, targets).item(), classification_margins(outputs, labels)


@torch.no_grad()
def evaluate(net, settings, dataset, data, round, epoch):
    """A row of metrics.csv: errors, bounds and, where they are due, certificates; `data` is the table of `measure_data`."""
    start, loss = time.perf_counter(), LOSSES[settings.loss]
    net.eval()
    train_loss, margins = losses_and_margins(net, dataset.train_images, dataset.train_labels, loss)
    test_loss, test_margins = losses_and_margins(net, dataset.test_images, dataset.test_labels, loss)
    require_finite(*net.state_dict().values(), margins)
    train_error, test_error = margin_error(margins, 0), margin_error(test_margins, 0)
    row = {'epoch': epoch, 'round': round, 'density': density(net), 'lr': learning_rate(settings, max(epoch, 1))}
    row |= {'train_loss': train_loss, 'test_loss': test_loss, 'train_error': train_error, 'test_error': test_error}
    row |= {'generalization_gap': test_error - train_error, 'train_margin_error': margin_error(margins, settings.gamma)}
    row |= evaluate_bounds(net, data, margins, settings.delta, settings.gamma, skip_uncovered=True)
    certifies = due(epoch, settings.certify_every, settings.epochs) and not no_certificate(settings)
    if certifies and not not_covered(net, dataset.input_shape):
        row |= certify(net, dataset.train_images, dataset.train_labels, settings.delta)
    row |= {'test_set_bound': test_set_bound(test_error, len(test_margins), settings.delta)}
    return row | {'eval_seconds': time.perf_counter() - start}


@torch.no_grad()
def evaluate_layers(net, dataset, round, epoch):
    """The rows of layers.csv, the input first and the classifier last: what each layer has learned, and how sparse it is."""
    learned = measure_representations(
        net, dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels
    )
    rows = [{'epoch': epoch, 'round': round, 'layer': layer} for layer in range(len(learned) + 1)]
    for row, values in zip(rows, learned):
        row |= values
    if not any(getattr(module, 'is_layer', False) for module in net):  # a residual block is a layer of several weights
        for row, values in zip(rows[:0:-1], reversed(measure_masks(net).values())):  # a stem is no layer
            row |= values
    if not not_covered(net, dataset.input_shape):
        for row, values in zip(rows[1:], sharing(net, dataset.train_images)):
            row |= values
    return rows


def require_finite(*tensors):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Diverged

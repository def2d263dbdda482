"""What is measured at an evaluation, and when: the schedule of a run, losses and errors, a row of each table, its columns."""

import math
import time

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import sparsify
from conf import RULES, BadInput
from measures.landscape import MEASURES, measure_landscape
from measures.masks import density, masked_density, measure_masks, sharing
from measures.norms import classification_margins, margin_error
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.pac_bayes import certify, test_set_bound
from measures.representations import measure_probes, measure_representations
from measures.steps import traced_once
from measures.trace import ieee_float32, images_per_pass, not_covered
from models import get_network
from utils import BOUNDS, evaluate_bounds

LOSSES = {
    'MSE': F.mse_loss,
    'CE': F.cross_entropy,
    'L1': F.l1_loss,
}  # of outputs and one-hot targets

_FIRST = (
    'epoch, round, density, lr, train_loss, test_loss, train_error, test_error, generalization_gap, train_margin_error, '
    'rho, prod_ratio, norm_ratio, path_norm'
).split(', ')
_LAST = [*CERTIFICATES, 'test_set_bound', *MEASURES]
_LAST += 'masked_density train_size test_size train_seconds eval_seconds'.split()
COLUMNS = [*_FIRST, *BOUNDS, *_LAST]
LAYER_COLUMNS = (
    'epoch, round, layer, size, train_ncc_error, test_ncc_error, train_cdnv, test_cdnv, density, dead_channels, active, '
    'participation, ramanujan_gap, imdb, weighted_gap, train_probe_error, test_probe_error, train_probe_loss, '
    'test_probe_loss, nc1, nc2, nc3, nc4'
).split(', ')
PROBES = [column for column in LAYER_COLUMNS if 'probe' in column]
# What summary.csv, compress.csv and pictures have beside the columns of metrics.csv and the knobs.
_OTHERS = 'name absolute_gap place deviation lam layer channels weights bytes speed_up residual gap'.split()


def check_bounds():
    """Raises BadInput where a name in BOUNDS cannot be a column beside those that the tables have."""
    for name in BOUNDS:
        if not (isinstance(name, str) and name.isidentifier()):
            raise BadInput(
                f'BOUNDS of utils.py: {name!r} cannot be a column; name it by letters, digits and _'
            )
        if name in (*_FIRST, *_LAST, *_OTHERS, *RULES) or name.endswith(
            '_setting'
        ):  # summary.csv has knobs, renamed at need
            raise BadInput(
                f'BOUNDS of utils.py: {name!r} is the name of another column; rename the bound'
            )


class Diverged(Exception):
    """The loss or a weight became NaN or infinite."""


def learning_rate(settings, epoch):
    """The learning rate of an epoch, counted from 1: times lr_decay after each milestone."""
    return settings.lr * settings.lr_decay ** sum(
        epoch > milestone for milestone in settings.milestones
    )


# ----------------------------------------------------------------------------------------------------------------------
# When
# ----------------------------------------------------------------------------------------------------------------------


def schedule(settings):
    """The places (round, epoch) of a run, in order: (0, 0) is the untrained network, (r, 0) with r > 0 the one just pruned.

    Each later round goes on from the epoch to which the weights are rewound.
    """
    again = [0, *range(max(settings.rewind_epoch, 0) + 1, settings.epochs + 1)]
    first = [(0, epoch) for epoch in range(settings.epochs + 1)]
    return first + [
        (round_, epoch) for round_ in range(1, settings.prune_rounds + 1) for epoch in again
    ]


def due(epoch, every, last=None):
    """Whether something that is done every so many epochs, and after the last one, is due after this one; 0 is never."""
    return every > 0 and (epoch % every == 0 or epoch == last)


def at_target(settings, train_loss):
    """Whether this training loss is at most `target_loss`, so that the training is at its end."""
    return settings.target_loss > 0 and train_loss <= settings.target_loss


def last_epoch(settings, epoch, train_loss):
    """The last epoch of a training, as far as it is known after this epoch with this training loss."""
    return epoch if at_target(settings, train_loss) else settings.epochs


def stopped_early(settings, rows):
    """Why a run whose newest rows these are goes on no further, before the end of its schedule; None where it does."""
    trained = (
        rows
        and rows[-1]['round'] == settings.prune_rounds
        and (rows[-1]['epoch'] > 0 or not settings.prune_rounds)
    )
    if trained and at_target(settings, rows[-1]['train_loss']):
        return f'stopped at epoch {rows[-1]["epoch"]:.0f}: training loss at most {settings.target_loss:g}'
    if not (rows and settings.early_stop_epoch and rows[-1]['epoch'] >= settings.early_stop_epoch):
        return None
    recent = [row for row in rows[-3:] if row['epoch'] > 0 and row['round'] == rows[-1]['round']]
    if len(recent) == 3 and all(
        1 - row['train_error'] < settings.early_stop_accuracy for row in recent
    ):
        return f'stopped at epoch {rows[-1]["epoch"]:.0f}: accuracy below {settings.early_stop_accuracy:g}'


def finished(settings, rows):
    """Whether a run whose newest rows these are has come to the end of its schedule, or was stopped early."""
    if rows and (rows[-1]['round'], rows[-1]['epoch']) >= schedule(settings)[-1]:
        return True
    return stopped_early(settings, rows) is not None


def no_certificate(settings):
    """Why the training samples are not as a certificate asks for, iid and at least 10; None where they are.

    Augmentation is no reason: a certificate holds for any training on the sample, and its error is of the sample as it is.
    """
    if settings.normalize:
        return 'normalize = True takes the statistics of the whole training set'
    if settings.label_noise:
        return 'with label_noise the training samples are not independent'
    if 0 < settings.train_samples < 10:
        return f'train_samples = {settings.train_samples}, and at least 10 are needed'


# ----------------------------------------------------------------------------------------------------------------------
# What
# ----------------------------------------------------------------------------------------------------------------------


def losses_and_margins(net, images, labels, loss):
    """The mean loss and the margins (m,) of a network on a whole set."""
    batch = images_per_pass(net, images)
    with parametrize.cached():
        # Filled in place: small tensors that stay, allocated between large ones that go, would tear the heap to pieces.
        outputs = net(images[:1]).double().repeat(len(images), 1)
        for rows, part in zip(outputs.split(batch), images.split(batch)):
            rows.copy_(net(part))
    targets = F.one_hot(labels, outputs.shape[1]).double()
    return loss(outputs, targets).item(), classification_margins(outputs, labels)


@torch.no_grad()
def training_loss(net, settings, dataset):
    """The mean loss on the training set, as `evaluate` logs it; leaves the network in evaluation mode."""
    net.eval()
    with ieee_float32():
        return losses_and_margins(
            net, dataset.train_images, dataset.train_labels, LOSSES[settings.loss]
        )[0]


def new_network(settings, dataset):
    """A network with the weights that its seed draws and without its initial masks, on the device of the dataset."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        net = get_network(settings, dataset.input_shape, dataset.num_classes)
    return net.to(dataset.train_images.device, memory_format=torch.channels_last)


@torch.enable_grad()  # SNIP's masks need gradients
def initial_network(settings, dataset):
    """The network as its training started, made anew from its seed, so that no checkpoint has to keep it."""
    net, targets = (
        new_network(settings, dataset),
        F.one_hot(dataset.train_labels, dataset.num_classes).float(),
    )
    sparsify.initialize(net, settings, dataset.train_images, targets, LOSSES[settings.loss])
    return net.eval()


@torch.no_grad()
@traced_once()
def evaluate(net, settings, dataset, data, round_, epoch, delta=None, certificates=None):
    """A row of metrics.csv: errors, bounds, certificates and measures where they are due; `data` is that of `measure_data`.

    All of it is of the network in IEEE float32, whatever precision it is trained in. Where the training data chose the
    network among several, bounds and certificates take the `delta` that is left for each. `certificates` keeps those that
    are found for an evaluation that is stopped and done again. Raises Diverged.
    """
    delta = settings.delta if delta is None else delta
    start, loss = time.perf_counter(), LOSSES[settings.loss]
    net.eval()
    with ieee_float32():
        train_loss, margins = losses_and_margins(
            net, dataset.train_images, dataset.train_labels, loss
        )
        test_loss, test_margins = losses_and_margins(
            net, dataset.test_images, dataset.test_labels, loss
        )
    require_finite(*net.state_dict().values(), margins)
    train_error, test_error = margin_error(margins, 0), margin_error(test_margins, 0)
    row = {
        'epoch': epoch,
        'round': round_,
        'density': density(net),
        'lr': learning_rate(settings, max(epoch, 1)),
    }
    row |= {
        'train_loss': train_loss,
        'test_loss': test_loss,
        'train_error': train_error,
        'test_error': test_error,
    }
    row |= {
        'generalization_gap': test_error - train_error,
        'train_margin_error': margin_error(margins, settings.gamma),
    }
    row |= evaluate_bounds(net, data, margins, delta, settings.gamma, skip_uncovered=True)
    last = last_epoch(settings, epoch, train_loss)
    if certifies(settings, round_, epoch, last) and not not_covered(net, dataset.input_shape):
        row |= certify(net, dataset.train_images, dataset.train_labels, delta, certificates)
    row |= {'test_set_bound': test_set_bound(test_error, len(test_margins), settings.delta)}
    row |= {
        'masked_density': masked_density(net),
        'train_size': len(margins),
        'test_size': len(test_margins),
    }
    if (round_, epoch) > (0, 0) and due(epoch, settings.measures_every, last):
        row |= measure_landscape(
            net, initial_network(settings, dataset), dataset.train_images, dataset.train_labels
        )
    return row | {'eval_seconds': time.perf_counter() - start}


def certifies(settings, round_, epoch, last):
    """Whether certificates are due: never of the untrained network."""
    trained = (round_, epoch) > (0, 0)
    return trained and due(epoch, settings.certify_every, last) and not no_certificate(settings)


@torch.no_grad()
@traced_once()
def evaluate_layers(net, dataset, round_, epoch, probes=False):
    """The rows of layers.csv, the input first, the classifier last: what each layer has learned, how sparse it is.

    Linear probes take longer than all the rest and are for the last epoch of a training.
    """
    sets = dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels
    learned = measure_representations(net, *sets)
    rows = [{'epoch': epoch, 'round': round_, 'layer': layer} for layer in range(len(learned) + 1)]
    for row, values in zip(rows, learned):
        row |= values
    for row, values in zip(rows, measure_probes(net, *sets) if probes else ()):
        row |= values
    if not any(
        getattr(module, 'is_layer', False) for module in net
    ):  # a residual block is a layer of several weights
        masks = list(measure_masks(net).values())
        for row, values in zip(
            rows[1:], masks[len(masks) - len(rows) + 1 :]
        ):  # a stem comes before the first layer
            row |= values
    if not not_covered(net, dataset.input_shape):
        for row, values in zip(rows[1:], sharing(net, dataset.input_shape)):
            row |= values
    return rows


def require_finite(*tensors):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Diverged


# ----------------------------------------------------------------------------------------------------------------------
# In words
# ----------------------------------------------------------------------------------------------------------------------


def rounded_up(bound, digits=4):
    """A bound to so many decimals, which it must not be below."""
    return math.ceil(10**digits * bound) / 10**digits if math.isfinite(bound) else bound


def report(row, width=120):
    """The cells of a row of metrics.csv that are wanted most, as many as fit; bounds are rounded up, as powers of 2."""
    bounds = {'our_bound': 'ours', 'corrected_bound': 'corrected'}
    if math.isnan(row.get('corrected_bound', math.nan)):
        bounds['path_bound'] = 'path'
    cells = {
        'test': ('test_error', '{:.4f}'),
        'train': ('train_error', '{:.4f}'),
        'gap': ('generalization_gap', '{:+.4f}'),
    }
    items = [f'{word} {text.format(row[column])}' for word, (column, text) in cells.items()]
    for column, word in bounds.items():
        if 0 < row.get(column, math.nan) < math.inf:
            items.append(f'{word} 2^{rounded_up(math.log2(row[column]), 1):.1f}')
    if row.get('pac_bayes_error', math.nan) <= 1:
        items.insert(1, f'A {rounded_up(row["pac_bayes_error"]):.4f}')
    while items and len(' '.join(items)) > width:
        items.pop()
    return ' '.join(items)

"""One row of metrics.csv and the rows of layers.csv; the schedule of a run."""

import math
import time

import torch
import torch.nn.functional as F

import sparsify
from conf import KNOBS, BadInput
from measures.landscape import MEASURES, measure_landscape
from measures.masks import density, masked_density, measure_masks, sharing
from measures.norms import classification_margins, margin_error
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.pac_bayes import certify
from measures.representations import measure_probes, measure_representations
from measures.steps import traced_once
from measures.tails import test_set_bound
from measures.trace import not_counted, not_covered, outputs
from models import get_network
from utils import BOUNDS, evaluate_bounds

LOSSES = {'MSE': F.mse_loss, 'CE': F.cross_entropy, 'L1': F.l1_loss}  # of outputs, one-hot targets

_FIRST = (
    'epoch, round, density, lr, train_loss, test_loss, train_error, test_error, '
    'generalization_gap, train_margin_error, rho, prod_ratio, norm_ratio, path_norm'
).split(', ')
_LAST = [*CERTIFICATES, 'test_set_bound', *MEASURES]
_LAST += 'masked_density train_size test_size train_seconds eval_seconds'.split()
COLUMNS = [*_FIRST, *BOUNDS, *_LAST]
LAYER_COLUMNS = (
    'epoch, round, layer, size, train_ncc_error, test_ncc_error, train_cdnv, test_cdnv, density, '
    'dead_channels, active, participation, ramanujan_gap, imdb, weighted_gap, train_probe_error, '
    'test_probe_error, train_probe_loss, test_probe_loss, nc1, nc2, nc3, nc4'
).split(', ')
# Names in summary.csv, compress.csv and pictures that a bound must not have either.
_OTHERS = 'name absolute_gap place deviation lam layer channels weights bytes speed_up residual gap'


class Diverged(Exception):
    """The loss or a weight became NaN or infinite."""


def require_finite(*tensors):
    """Raises Diverged if a tensor contains NaN or infinity."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Diverged


def check_bounds():
    """Raises BadInput if a name in BOUNDS cannot be a column."""
    taken = {*_FIRST, *_LAST, *_OTHERS.split(), *KNOBS}
    for name in BOUNDS:
        if not (isinstance(name, str) and name.isidentifier()):
            raise BadInput(f'BOUNDS of utils.py: {name!r}: name a bound by letters, digits and _')
        if name in taken or name.endswith('_setting'):  # summary.csv has knobs, renamed at need
            raise BadInput(f'BOUNDS of utils.py: {name!r} is the name of another column; rename it')


# ------------------------------------------------------------------------------------------------
# The schedule
# ------------------------------------------------------------------------------------------------


def learning_rate(settings, epoch):
    """The learning rate of an epoch, counted from 1: times lr_decay after each milestone."""
    return settings.lr * settings.lr_decay ** sum(epoch > last for last in settings.milestones)


def schedule(settings):
    """The positions (round, epoch) of a run, in order.

    (0, 0) is the untrained network, (r, 0) with r > 0 the one that round r has just pruned. A round
    trains from the epoch to which its weights are rewound.
    """
    positions = [(0, epoch) for epoch in range(settings.epochs + 1)]
    first = max(settings.rewind_epoch, 0) + 1
    for round_ in range(1, settings.prune_rounds + 1):
        positions.append((round_, 0))
        positions += [(round_, epoch) for epoch in range(first, settings.epochs + 1)]
    return positions


def due(epoch, every, last=None):
    """True at multiples of `every` and at `last`; never if `every` is 0."""
    return every > 0 and (epoch % every == 0 or epoch == last)


def at_target(settings, train_loss):
    """Whether this training loss, at most `target_loss`, ends a training."""
    return settings.target_loss > 0 and train_loss <= settings.target_loss


def last_epoch(settings, epoch, train_loss):
    """This epoch if its training loss met target_loss, else settings.epochs."""
    return epoch if at_target(settings, train_loss) else settings.epochs


def stopped_early(settings, rows):
    """Why a run with these rows ends before the end of its schedule, as a text; None if not."""
    if not rows:
        return None
    last = rows[-1]
    trained = last['epoch'] > 0 or not settings.prune_rounds
    if last['round'] == settings.prune_rounds and trained:
        if at_target(settings, last['train_loss']):
            loss = f'training loss at most {settings.target_loss:g}'
            return f'stopped at epoch {last["epoch"]:.0f}: {loss}'
    if not settings.early_stop_epoch or last['epoch'] < settings.early_stop_epoch:
        return None
    recent = [row for row in rows[-3:] if row['epoch'] > 0 and row['round'] == last['round']]
    if len(recent) < 3 or any(
        1 - row['train_error'] >= settings.early_stop_accuracy for row in recent
    ):
        return None
    return f'stopped at epoch {last["epoch"]:.0f}: accuracy below {settings.early_stop_accuracy:g}'


def is_finished(settings, rows):
    """Whether a run with these rows has come to the end of its schedule, or was stopped early."""
    if rows and (rows[-1]['round'], rows[-1]['epoch']) >= schedule(settings)[-1]:
        return True
    return stopped_early(settings, rows) is not None


def no_certificate(settings):
    """Why no certificate is possible (samples not i.i.d., or fewer than 10); None if it is.

    Augmentation is no reason: a certificate holds for any training on the sample, and the error
    that it bounds is measured on the sample as it is.
    """
    if settings.normalize:
        return 'normalize = True takes the statistics of the whole training set'
    if settings.label_noise:
        return 'with label_noise the training samples are not identically distributed'
    if 0 < settings.train_samples < 10:
        return f'train_samples = {settings.train_samples}, and at least 10 are needed'


def certifies(settings, round_, epoch, last):
    """Whether certificates are due: never of the untrained network."""
    trained = (round_, epoch) > (0, 0)
    return trained and due(epoch, settings.certify_every, last) and not no_certificate(settings)


# ------------------------------------------------------------------------------------------------
# A network at its start
# ------------------------------------------------------------------------------------------------


@torch.enable_grad()  # SNIP's masks need gradients
def initial_network(settings, dataset):
    """The network with which the training starts, which its seed determines, in evaluation mode."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        net = get_network(settings, dataset.input_shape, dataset.num_classes)
    net.to(dataset.train_images.device, memory_format=torch.channels_last)
    targets = F.one_hot(dataset.train_labels, dataset.num_classes).float()
    sparsify.initialize(net, settings, dataset.train_images, targets, LOSSES[settings.loss])
    return net.eval()


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


def losses_and_margins(net, images, labels, loss):
    """The mean loss and the margins (m,) of a network on a whole set, in IEEE float32."""
    scores = outputs(net, images)
    targets = F.one_hot(labels, scores.shape[1]).double()
    return loss(scores, targets).item(), classification_margins(scores, labels)


@torch.no_grad()
def training_loss(net, settings, dataset):
    """The mean loss on the training set."""
    loss = LOSSES[settings.loss]
    return losses_and_margins(net, dataset.train_images, dataset.train_labels, loss)[0]


@torch.no_grad()
@traced_once()
def evaluate(net, settings, dataset, data, round_, epoch, delta=None):
    """A row of metrics.csv, {column: number}; what is not due or does not apply has no cell.

    All of it is measured in IEEE float32 or float64, whatever precision the training has.

    Args:
        data: `measure_data(net, dataset.train_images)`.
        delta: confidence of bounds and certificates in place of settings.delta: a share of it, if
            the training data chose the network among several.
    Raises:
        Diverged: weights or outputs are not finite.
    """
    delta = settings.delta if delta is None else delta
    start, loss = time.perf_counter(), LOSSES[settings.loss]
    net.eval()
    train_set = dataset.train_images, dataset.train_labels
    train_loss, margins = losses_and_margins(net, *train_set, loss)
    test_loss, test_margins = losses_and_margins(
        net, dataset.test_images, dataset.test_labels, loss
    )
    require_finite(*net.state_dict().values(), margins)
    train_error, test_error = margin_error(margins, 0), margin_error(test_margins, 0)
    row = {
        'epoch': epoch,
        'round': round_,
        'masked_density': masked_density(net),
        'lr': learning_rate(settings, max(epoch, 1)),
        'train_loss': train_loss,
        'test_loss': test_loss,
        'train_error': train_error,
        'test_error': test_error,
        'generalization_gap': test_error - train_error,
        'train_margin_error': margin_error(margins, settings.gamma),
        'train_size': len(margins),
        'test_size': len(test_margins),
        'test_set_bound': test_set_bound(test_error, len(test_margins), settings.delta),
    }
    row |= evaluate_bounds(net, data, margins, delta, settings.gamma, skip_uncovered=True)
    if settings.normalize:  # the images depend on the whole sample, so that no error is certified
        row |= {name: math.nan for name in row if name.startswith('certified_')}
    if not not_counted(net):
        row['density'] = density(net)
    last = last_epoch(settings, epoch, train_loss)
    if certifies(settings, round_, epoch, last) and not not_covered(net, dataset.input_shape):
        row |= certify(net, dataset.train_images, dataset.train_labels, delta)
    if (round_, epoch) > (0, 0) and due(epoch, settings.measures_every, last):
        start_net = initial_network(settings, dataset)
        row |= measure_landscape(net, start_net, dataset.train_images, dataset.train_labels)
    return row | {'eval_seconds': time.perf_counter() - start}


@torch.no_grad()
@traced_once()
def evaluate_layers(net, dataset, round_, epoch, probes=False):
    """The rows of layers.csv, the input first and the classifier last: what each layer has learned.

    Linear probes take longer than all else together and are meant for the last epoch.
    """
    sets = (
        dataset.train_images,
        dataset.train_labels,
        dataset.test_images,
        dataset.test_labels,
    )
    learned = measure_representations(net, *sets)
    rows = []
    for layer in range(len(learned) + 1):
        rows.append({'epoch': epoch, 'round': round_, 'layer': layer})
    for row, values in zip(rows, learned):
        row |= values
    if probes:
        for row, values in zip(rows, measure_probes(net, *sets)):
            row |= values
    # A residual block is one layer with several weights, whose masks have no row of their own.
    blocks = any(getattr(module, 'is_layer', False) for module in net)
    if not blocks and not not_counted(net):
        masks = list(measure_masks(net).values())[1 - len(rows) :]  # a stem has no row either
        for row, values in zip(rows[1:], masks):
            row |= values
    if not not_covered(net, dataset.input_shape):
        for row, values in zip(rows[1:], sharing(net, dataset.input_shape)):
            row |= values
    return rows


def rounded_up(bound, digits=4):
    """A bound rounded up to this number of decimals, so that it is still a bound."""
    return math.ceil(10**digits * bound) / 10**digits if math.isfinite(bound) else bound


def power_of_2(bound):
    """A bound as a text, 2^3.7, rounded up."""
    if 0 < bound < math.inf:
        return f'2^{rounded_up(math.log2(bound), 1):.1f}'
    return f'{bound:g}'


def report(row):
    """The most important cells of a row as a line; bounds are powers of 2, rounded up."""
    items = [f'test {row["test_error"]:.4f}']
    if row.get('pac_bayes_error', math.nan) <= 1:
        items.append(f'A {rounded_up(row["pac_bayes_error"]):.4f}')
    items += [f'train {row["train_error"]:.4f}', f'gap {row["generalization_gap"]:+.4f}']
    names = {'our_bound': 'ours', 'corrected_bound': 'corrected'}
    if math.isnan(row.get('corrected_bound', math.nan)):
        names['path_bound'] = 'path'
    for column, name in names.items():
        if 0 < row.get(column, math.nan) < math.inf:
            items.append(f'{name} {power_of_2(row[column])}')
    return ' '.join(items)

"""Sparse networks: masks at initialization, pruning rounds with rewinding, and regrowth.

Every function depends only on its arguments: what is random is drawn from generators keyed by the
seed and the round or step, so that a resumed run equals an uninterrupted one. Weights, masks and
momentum change in place, since a captured CUDA graph keeps their addresses. The masks are buffers
of the network, so its checkpoints hold them.

`check` validates the settings of a run, `initialize` masks a new network, `regrow` moves weights at
the steps that `regrow_due` selects, `prune` and `rewind` act between rounds; train.py calls them.
"""

import copy
import math

import numpy as np
import torch
from torch.nn.utils import parametrize

from conf import BadInput
from measures.masks import hidden_readers, reads, weight_mask
from measures.paths import path_magnitude, rescale_neurons
from measures.trace import weight_layers
from models.weight_norm import free_weight, set_mask

SNIP_SAMPLES = 1000  # training samples for SNIP's gradient
BATCH = 100  # of these in a pass
SYNFLOW_ROUNDS = 100  # in a single round SynFlow would empty whole layers
# A layer keeps at least this share of the channels that it would keep if all layers lost equally.
CHANNEL_FLOOR = 0.5
# Factors of rescaled neurons: powers of 2, so that the function stays equal to the bit.
FACTORS = 1, 128, 4096
PURPOSES = 'random', 'snip', 'grow', 'rescale'  # of a generator


def check(settings):
    """Raises BadInput where settings of sparsity contradict each other."""
    masked = settings.initial_mask != 'none'
    regrow, regrows = settings.regrow, settings.regrow != 'none'
    rounds, rewind_epoch = settings.prune_rounds, settings.rewind_epoch
    if settings.density < 1 and not masked:
        raise BadInput(
            f'density = {settings.density}: needs an initial_mask: random, erk, snip or synflow'
        )
    if regrows and not (masked and settings.density < 1):
        raise BadInput(
            f'regrow = {regrow!r}: needs an initial_mask and a density below 1; '
            'otherwise there is nothing to regrow'
        )
    if settings.channel_sparsity and not regrows:
        raise BadInput(
            f'channel_sparsity = {settings.channel_sparsity}: needs regrow: random or gradient'
        )
    if regrows and rounds:
        raise BadInput(f'prune_rounds = {rounds}: not with regrow = {regrow!r}; set one of the two')
    if regrow == 'gradient' and settings.regrow_every == 1:
        raise BadInput(
            "regrow_every = 1: must be at least 2 with regrow = 'gradient', "
            'whose updates replace steps'
        )
    if rounds and settings.target_loss and rewind_epoch > 0:
        raise BadInput(
            f'rewind_epoch = {rewind_epoch}: must be 0 or -1 with target_loss, '
            'which may end the training before that epoch'
        )
    if rounds and settings.epochs <= max(rewind_epoch, 0):
        raise BadInput(
            f'rewind_epoch = {rewind_epoch}: must be below epochs = {settings.epochs}, '
            'to leave epochs for the training after pruning'
        )


def prunable(net):
    """{name: module} of the layers with masks."""
    layers = weight_layers(net).items()
    return {name: layer for name, layer in layers if weight_mask(layer) is not None}


def masks_of(layers):
    """The masks of layers, as a list of their own buffers."""
    return [weight_mask(layer) for layer in layers]


def set_masks(layers, masks, keep_g=False):
    """Sets the mask of each layer; see models.weight_norm.set_mask."""
    for layer, mask in zip(layers, masks):
        set_mask(layer, mask, keep_g)


# --- masks at initialization ---


def initialize(net, settings, images, targets, loss):
    """Masks a new network as the settings say.

    Args:
        net: the network, just initialized.
        images, targets: (N, C, H, W) and (N, classes), the training set; SNIP samples from it.
        loss: function of outputs and targets, a mean over samples.
    Raises:
        BadInput: the network is not covered by the score of the pruning rounds or by
            channel_sparsity.
    """
    if settings.channel_sparsity and not hidden_readers(net):
        raise BadInput(
            f'channel_sparsity = {settings.channel_sparsity}: needs a chain, '
            f'a network without skips and groups, unlike {settings.network}'
        )
    if settings.prune_rounds:
        # Computed only so that a network it does not cover is refused now, not after training.
        pruning_scores(net, settings, 1, tuple(images.shape[1:]))
    if settings.density < 1:
        masks = initial_masks(net, settings, images, targets, loss)
        set_masks(prunable(net).values(), masks, keep_g=True)


def initial_masks(net, settings, images, targets, loss):
    """The masks of the prunable layers, as a list; arguments as of `initialize`."""
    layers = prunable(net)
    if settings.initial_mask == 'synflow':
        return synflow_masks(net, layers, settings.density, tuple(images.shape[1:]))
    if settings.initial_mask == 'snip':
        order = _generator(settings.seed, 0, 'snip').permutation(len(images))
        chosen = torch.from_numpy(order[:SNIP_SAMPLES]).to(images.device)
        scores = snip_scores(net, layers, images[chosen], targets[chosen], loss)
    else:
        scores = random_scores(layers.values(), _generator(settings.seed, 0, 'random'))
    if settings.initial_mask == 'erk':
        scores = erk_scores(scores, settings.density)
    alive = masks_of(layers.values())
    total = sum(mask.numel() for mask in alive)
    return best_masks(scores, alive, round(settings.density * total))


def erk_scores(scores, density):
    """Scores whose best weights have the layer densities of Erdos-Renyi-Kernel (Evci et al. 2020).

    The density of a layer is eps sum(shape) / prod(shape). A layer for which this exceeds 1 is
    dense, and eps, which fixes the overall density, is solved again for the other layers.

    Args:
        scores: a list with a tensor of scores for each layer, whose order within a layer stays.
        density: share of weights that will be kept.
    """
    total = sum(score.numel() for score in scores)
    raw = [sum(score.shape) / score.numel() for score in scores]
    dense = set()
    while True:
        sparse = [index for index in range(len(scores)) if index not in dense]
        count = density * total - sum(scores[index].numel() for index in dense)
        eps = count / sum(sum(scores[index].shape) for index in sparse)
        above = [index for index in sparse if eps * raw[index] > 1]
        if not above:
            break
        dense.update(above)
    # The k-th best of a layer that shall keep n weights scores -(k - 1/2) / n: taking the best over
    # all layers then shares out whole weights by rounding (Webster's rule).
    new = []
    for index, score in enumerate(scores):
        kept = score.numel()
        if index not in dense:
            kept *= eps * raw[index]
        order = score.flatten().argsort(descending=True, stable=True)
        ranks = order.argsort().view(score.shape).double() + 0.5
        new.append(-ranks / kept)
    return new


def snip_scores(net, names, images, targets, loss):
    """|w dL/dw| of the effective weights of named layers (Lee et al. 2019), in float64.

    L is the sum of the losses of the batches, each a mean over its samples.
    """
    # A copy, since batch normalization in training mode moves its running statistics.
    net = copy.deepcopy(net).double().train()
    with parametrize.cached():
        weights = [net.get_submodule(name).weight for name in names]
        totals = [torch.zeros_like(weight) for weight in weights]
        for batch, target in zip(images.double().split(BATCH), targets.double().split(BATCH)):
            gradients = torch.autograd.grad(loss(net(batch), target), weights)
            for total, gradient in zip(totals, gradients):
                total.add_(gradient)
        return [(weight * total).abs().detach() for weight, total in zip(weights, totals)]


def synflow_scores(net, layers, input_shape):
    """w dR/dw of layers of a network of nonnegative parameters (Tanaka et al. 2020).

    R is the sum of the outputs at an image of ones.
    """
    with parametrize.cached():
        weights = [layer.weight for layer in layers]
        ones = torch.ones(1, *input_shape, dtype=weights[0].dtype, device=weights[0].device)
        flows = torch.autograd.grad(net(ones).sum(), weights)
        return [(weight * flow).detach() for weight, flow in zip(weights, flows)]


def synflow_masks(net, names, density, input_shape):
    """SynFlow's masks of named layers; after round k of 100, density^(k/100) of the weights stay.

    Scores are computed again in each round, in float64.
    """
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()  # an effective weight g V / ||V|| becomes its absolute value too
    layers = [net.get_submodule(name) for name in names]
    alive = masks_of(layers)
    total = sum(mask.numel() for mask in alive)
    for k in range(1, SYNFLOW_ROUNDS + 1):
        scores = synflow_scores(net, layers, input_shape)
        masks = best_masks(scores, alive, round(density ** (k / SYNFLOW_ROUNDS) * total))
        set_masks(layers, masks)  # changes `alive`, the layers' own buffers, too
    return masks


# --- pruning rounds ---


def prune(net, settings, round_, input_shape):
    """Prunes the share `prune_fraction` of the surviving weights, those of least score.

    The others keep their effective values. With the allocation 'global' the share is taken over all
    layers, with 'layer' in each of them. Each layer keeps its best weight; of equal scores the
    first stays.

    Args:
        net: a trained network.
        round_: the round that follows, counted from 1; it keys what is random.
        input_shape: (channels, height, width) of an image.
    """
    layers = list(prunable(net).values())
    scores = pruning_scores(net, settings, round_, input_shape)
    if settings.prune_allocation == 'global':
        _prune_together(layers, scores, settings.prune_fraction)
    else:
        for layer, score in zip(layers, scores):
            _prune_together([layer], [score], settings.prune_fraction)


def _prune_together(layers, scores, fraction):
    alive = masks_of(layers)
    count = sum(int(mask.sum()) for mask in alive)
    set_masks(layers, best_masks(scores, alive, count - round(fraction * count)))


def pruning_scores(net, settings, round_, input_shape):
    """The scores of each prunable layer's effective weight in a pruning round, as a list."""
    layers = prunable(net)
    if settings.prune_score == 'random':
        return random_scores(layers.values(), _generator(settings.seed, round_, 'random'))
    if settings.rescale_neurons:
        generator = _generator(settings.seed, round_, 'rescale')
        net = rescale_neurons(net, lambda count: torch.from_numpy(generator.choice(FACTORS, count)))
    if settings.prune_score == 'path':
        scores = path_magnitude(net, input_shape)
        return [scores[f'{name}.weight'] for name in layers]
    return [net.get_submodule(name).weight.detach().abs() for name in layers]


@torch.no_grad()
def rewind(net, optimizer, saved):
    """Restores all but the masks, with g = ||W * M|| of each masked weight; momentum becomes 0.

    Args:
        saved: the network's state_dict at the epoch to rewind to; None: weights stay as trained.
    """
    if saved is not None:
        layers = prunable(net).values()
        masks = [mask.clone() for mask in masks_of(layers)]
        net.load_state_dict(saved)
        set_masks(layers, masks)
    for state in optimizer.state.values():
        if state.get('momentum_buffer') is not None:
            state['momentum_buffer'].zero_()


# --- regrowth ---


def regrow_due(settings, step, steps):
    """Whether masks are updated at this step, counted from 0, of a training of `steps` steps."""
    if settings.regrow == 'none' or step >= settings.regrow_until * steps:
        return False
    return step % settings.regrow_every == 0


def regrow(net, optimizer, settings, step, steps, batch_loss):
    """Drops the smallest weights of each layer and grows as many others.

    This is SET (Mocanu et al. 2018), which grows at random, or RigL (Evci et al. 2020), which grows
    by the largest gradients. The dropped share falls as a cosine from regrow_fraction to 0 at
    regrow_until. Weights that were just dropped may grow again, with their value and momentum; all
    others start at 0, with momentum 0. With channel_sparsity, whole channels are dropped first
    (Yin et al. 2023), and their weights grow elsewhere in the layer. The number of a layer's
    weights stays, unless fewer may grow.

    Args:
        batch_loss: function without arguments that returns the loss of a batch, with its graph;
            called with regrow = 'gradient' only.
    """
    layers = list(prunable(net).values())
    if settings.regrow == 'gradient':
        growth = [gradient.abs() for gradient in dense_gradients(layers, batch_loss)]
    else:
        growth = random_scores(layers, _generator(settings.seed, step, 'grow'))
    done = step / (settings.regrow_until * steps)
    share = settings.regrow_fraction / 2 * (1 + math.cos(math.pi * done))

    # Drop dead channels, then the smallest weights. Within a layer |V| ranks as the weight |W|.
    readers = hidden_readers(net)
    channels = living_channels(readers, settings.channel_sparsity, done)
    alive, kept = [], []
    for layer, inside in zip(layers, _allowed(layers, readers, channels)):
        mask = weight_mask(layer) & inside
        count = int(mask.sum())
        magnitude = free_weight(layer).detach().abs().masked_fill(~mask, -math.inf)
        alive.append(mask)
        kept.append(_top(magnitude, count - int(share * count)))

    # In a network without biases the output of an empty filter is 0, where the gradient of the ReLU
    # is 0: weights that grew in it, or that read it, would stay 0 for good. So none grow there.
    bias_free = not settings.bias and settings.normalization != 'batch'
    if settings.channel_sparsity or bias_free:
        channels = _nonempty(readers, channels, dict(zip(layers, kept)))

    allowed = _allowed(layers, readers, channels)
    for layer, score, mask, stays, may_grow in zip(layers, growth, alive, kept, allowed):
        weight = free_weight(layer)
        may_grow |= mask & weight.ne(0)  # weights that were just dropped may always return
        candidates = may_grow & ~stays
        count = int(weight_mask(layer).sum()) - int(stays.sum())
        grown = _top(score.masked_fill(~candidates, -math.inf), count) & candidates
        set_mask(layer, stays | grown)
        momentum = optimizer.state.get(weight, {}).get('momentum_buffer')
        if momentum is not None:
            momentum.mul_(weight_mask(layer))


def dense_gradients(layers, batch_loss):
    """The gradients of the layers' free weights, also at masked entries.

    While the masks are opened the masked entries are still 0, so the loss is the loss of the masked
    network. Under weight normalization the gradient at an entry V = 0 is (g / ||V||) dL/dW: within
    a layer it ranks as dL/dW.
    """
    masks = masks_of(layers)
    before = [mask.clone() for mask in masks]
    for mask in masks:
        mask.fill_(True)
    gradients = torch.autograd.grad(batch_loss(), [free_weight(layer) for layer in layers])
    for mask, values in zip(masks, before):
        mask.copy_(values)
    return gradients


def living_channels(readers, channel_sparsity, done):
    """The channels of hidden layers that are kept when a share `done` of the regrowth is over.

    With s = channel_sparsity, a share s (1 - (1 - done)^3) of the channels of all layers is dead:
    those of least mean |W| over all entries of the filter, which counts as 0 where no weight reads
    the channel. A layer keeps at least CHANNEL_FLOOR (1 - s) of its channels, and one.

    Args:
        readers: {layer: the layer that reads its channels}, as `hidden_readers` gives it.
    Returns:
        A boolean tensor (channels,) for each layer of `readers`.
    """
    scores = []
    for layer, reader in readers.items():
        score = layer.weight.detach().double().abs().flatten(1).mean(1)
        scores.append(score * reads(reader, len(score)))
    alive = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    if not channel_sparsity:
        return alive
    share = 1 - channel_sparsity * (1 - (1 - done) ** 3)
    least = CHANNEL_FLOOR * (1 - channel_sparsity)
    floors = [max(1, int(least * len(score))) for score in scores]
    return best_masks(scores, alive, round(share * sum(map(len, scores))), floors)


def _nonempty(layers, channels, kept):
    """The channels whose filters have weights other than 0; all of a layer that would lose all."""
    found = []
    for layer, alive in zip(layers, channels):
        filled = (kept[layer] & layer.weight.ne(0)).flatten(1).any(1) & alive
        if not filled.any():
            filled = alive
        found.append(filled)
    return found


def _allowed(layers, readers, channels):
    """Masks of the layers that leave out filters of dead channels and weights that read them."""
    allowed = {layer: torch.ones_like(weight_mask(layer)) for layer in layers}
    for (layer, reader), alive in zip(readers.items(), channels):
        allowed[layer][~alive] = False
        if reader in allowed:  # a classifier that stays dense has no mask
            # A linear layer reads a channel of maps at several positions, one after the other.
            inputs = alive.repeat_interleave(reader.weight.shape[1] // len(alive))
            allowed[reader][:, ~inputs] = False
    return list(allowed.values())


# --- scores and masks ---


def best_masks(scores, alive, count, floors=None):
    """Masks that keep the best weights of several layers together.

    Args:
        scores, alive: lists with a tensor for each layer: scores, and boolean masks outside of
            which nothing is kept.
        count: number of weights to keep; raised to the sum of the floors.
        floors: least number of weights for each layer; 1 by default.
    Returns:
        A list of masks. Of equal scores the first wins, in the order of layers and entries.
    """
    if floors is None:
        floors = [1] * len(scores)
    raised = []
    for score, mask, floor in zip(scores, alive, floors):
        score = score.double().masked_fill(~mask, -math.inf).flatten()
        score[_top(score, floor)] = math.inf
        raised.append(score)
    kept = _top(torch.cat(raised), max(count, sum(floors)))
    parts = kept.split([len(score) for score in raised])
    return [part.view(mask.shape) for part, mask in zip(parts, alive)]


def _top(score, count):
    """A mask of the `count` largest scores; of equal ones the first."""
    order = score.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    chosen.view(-1)[order[:count]] = True
    return chosen


def random_scores(layers, generator):
    """A uniform draw for each weight of each layer, in their order."""
    draws = []
    for mask in masks_of(layers):
        draws.append(torch.from_numpy(generator.random(mask.shape)).to(mask.device))
    return draws


def _generator(seed, number, purpose):
    """A generator keyed by the seed, the round or step, and what is drawn; shuffles use others."""
    return np.random.default_rng((seed, number, 1 + PURPOSES.index(purpose)))

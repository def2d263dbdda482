"""Which weights live: masks at the start, pruning rounds with rewinding, and regrowth while the network trains.

Every function is pure in (network, optimizer, settings, round or step): it draws from generators of its own, so that a run
that was interrupted anywhere goes on as if it had not been, and it changes weights, masks and momentum in place, so that a
captured CUDA graph stays valid. The masks are buffers of the network, and so in its checkpoints.

`check` is for the launch, `initialize` for a network that is new, `regrow` for steps that are `regrow_due`,
`prune` and `rewind` for the rounds; the training is in train.py.
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

SNIP_SAMPLES = 1000  # SNIP's gradient is the sum over so many training samples, in batches of 100
SYNFLOW_ROUNDS = 100  # in one round SynFlow would empty layers
CHANNEL_FLOOR = (
    0.5  # a layer keeps so much of what would be left to it if all layers lost the same share
)
FACTORS = (
    1,
    128,
    4096,
)  # of rescaled neurons: powers of 2, so that the function stays the same bit for bit


def check(settings):
    """Raises BadInput where settings of sparsity do not go together."""
    if settings.initial_mask == 'none' and settings.density < 1:
        raise BadInput(
            f'density = {settings.density}: needs an initial_mask: random, erk, snip or synflow'
        )
    if settings.regrow != 'none' and (settings.initial_mask == 'none' or settings.density == 1):
        raise BadInput(
            f'regrow = {settings.regrow!r}: needs an initial_mask, with a density below 1; nothing is dead without'
        )
    if settings.channel_sparsity and settings.regrow == 'none':
        raise BadInput(
            f'channel_sparsity = {settings.channel_sparsity}: needs regrow: random or gradient'
        )
    if settings.regrow != 'none' and settings.prune_rounds:
        raise BadInput(
            f'prune_rounds = {settings.prune_rounds}: not with regrow = {settings.regrow!r}; set one of the two'
        )
    if settings.regrow == 'gradient' and settings.regrow_every == 1:
        raise BadInput(
            "regrow_every = 1: must be at least 2 with regrow = 'gradient', whose updates take the place of steps"
        )
    if settings.prune_rounds and settings.target_loss and settings.rewind_epoch > 0:
        raise BadInput(
            f'rewind_epoch = {settings.rewind_epoch}: must be 0 or -1 with target_loss, which may come before it'
        )
    if settings.prune_rounds and max(settings.rewind_epoch, 0) >= settings.epochs:
        raise BadInput(
            f'rewind_epoch = {settings.rewind_epoch}: must be below epochs = {settings.epochs}, to train after pruning'
        )


def prunable(net):
    """{name: module} of the layers with masks."""
    return {
        name: layer for name, layer in weight_layers(net).items() if weight_mask(layer) is not None
    }


def initialize(net, settings, images, targets, loss):
    """Applies the masks of the start.

    Args:
        net: the network, just initialized.
        images, targets: (N, C, H, W) and (N, classes), the training set, of which SNIP takes some samples.
        loss: function of outputs and targets, a mean over samples.
    Raises:
        BadInput: the score of the pruning rounds does not cover the network, or channel_sparsity does not.
    """
    layers = prunable(net)
    if settings.channel_sparsity and not hidden_readers(net):
        chain = 'needs a chain, a network without skips and groups'
        raise BadInput(
            f'channel_sparsity = {settings.channel_sparsity}: {chain}, unlike {settings.network}'
        )
    if settings.prune_rounds:
        _pruning_scores(
            net, settings, 1, tuple(images.shape[1:])
        )  # refused before the training, not after it
    if settings.density == 1:
        return
    if settings.initial_mask == 'synflow':
        masks = synflow_masks(net, layers, settings.density, tuple(images.shape[1:]))
    else:
        if settings.initial_mask == 'snip':
            chosen = torch.from_numpy(
                _generator(settings.seed, 0, 'snip').permutation(len(images))[:SNIP_SAMPLES]
            )
            scores = snip_scores(
                net,
                layers,
                images[chosen.to(images.device)],
                targets[chosen.to(images.device)],
                loss,
            )
        else:
            scores = _random_scores(layers.values(), _generator(settings.seed, 0, 'random'))
        if settings.initial_mask == 'erk':
            scores = erk_scores(scores, settings.density)
        alive = [weight_mask(layer) for layer in layers.values()]
        masks = best_masks(
            scores, alive, round(settings.density * sum(mask.numel() for mask in alive))
        )
    for layer, mask in zip(layers.values(), masks):
        set_mask(layer, mask, keep_g=True)


def prune(net, settings, round_, input_shape):
    """Kills the share `prune_fraction` of the living weights, those of least score, in a trained network before round `round_`.

    What is left of the effective weights keeps its values. With the allocation 'global' exactly round(prune_fraction * living)
    weights go, with 'layer' so many of each layer; each layer keeps its best-scored weight; ties leave the first.
    """
    scored = list(zip(prunable(net).values(), _pruning_scores(net, settings, round_, input_shape)))
    for group in [scored] if settings.prune_allocation == 'global' else [[pair] for pair in scored]:
        layers, scores = zip(*group)
        alive = [weight_mask(layer) for layer in layers]
        living = sum(int(mask.count_nonzero()) for mask in alive)
        for layer, mask in zip(
            layers, best_masks(scores, alive, living - round(settings.prune_fraction * living))
        ):
            set_mask(layer, mask)


@torch.no_grad()
def rewind(net, optimizer, saved):
    """Puts everything but the masks back to its saved values, effective weights W * M with g = ||W * M||; momentum is 0.

    Args:
        saved: the state_dict of the network as it was at the epoch to rewind to; None: weights stay as they are.
    """
    if saved is not None:
        masked = list(prunable(net).values())
        masks = [weight_mask(layer).clone() for layer in masked]
        net.load_state_dict(saved)
        for layer, mask in zip(masked, masks):
            set_mask(layer, mask)
    for state in optimizer.state.values():
        if state.get('momentum_buffer') is not None:
            state['momentum_buffer'].zero_()


def regrow_due(settings, step, steps):
    """Whether the masks are updated at this step, counted from 0 over the whole training of `steps` steps."""
    due = step % settings.regrow_every == 0 and step < settings.regrow_until * steps
    return settings.regrow != 'none' and due


def regrow(net, optimizer, settings, step, steps, batch_loss):
    """Drops each layer's least living weights for as many dead ones: SET (Mocanu et al. 2018) or RigL (Evci et al. 2020).

    The share dropped falls as a cosine from regrow_fraction to 0 at regrow_until. What grows is drawn at random or has the
    largest gradient; the just dropped may return, and then keep weight and momentum. The others start at 0, with momentum 0.
    With channel_sparsity, channels die first (Yin et al. 2023), and their weights grow elsewhere in a layer.
    It has as many living weights as before, or all that may live where these are fewer.

    Args:
        batch_loss: function without arguments that returns a batch's loss with its graph; called by regrow = 'gradient' alone.
    """
    layers = list(prunable(net).values())
    free = [free_weight(layer) for layer in layers]
    if settings.regrow == 'gradient':
        growth = [gradient.abs() for gradient in dense_gradients(layers, batch_loss)]
    else:
        growth = _random_scores(layers, _generator(settings.seed, step, 'grow'))
    done = step / (settings.regrow_until * steps)
    share = settings.regrow_fraction / 2 * (1 + math.cos(math.pi * done))
    readers = hidden_readers(net)
    channels = living_channels(readers, settings.channel_sparsity, done)
    alive = [
        weight_mask(layer) & room for layer, room in zip(layers, _places(layers, readers, channels))
    ]
    kept = []
    for weight, mask in zip(free, alive):
        living = int(mask.count_nonzero())
        kept.append(
            _top(weight.detach().abs().masked_fill(~mask, -math.inf), living - int(share * living))
        )
    if settings.channel_sparsity or not (settings.bias or settings.normalization == 'batch'):
        channels = _filled(readers, channels, dict(zip(layers, kept)))
    rooms = _places(layers, readers, channels)
    for layer, weight, score, before, stays, room in zip(layers, free, growth, alive, kept, rooms):
        room |= before & weight.ne(0)  # the just dropped may return in any case
        grown = int(weight_mask(layer).count_nonzero()) - int(stays.count_nonzero())
        set_mask(layer, stays | _top(score.masked_fill(stays | ~room, -math.inf), grown) & room)
        momentum = optimizer.state.get(weight, {}).get('momentum_buffer')
        if momentum is not None:
            momentum.mul_(weight_mask(layer))


def living_channels(readers, channel_sparsity, done):
    """Which channels of hidden layers live on when the share `done` of the steps until regrow_until is over.

    With s = channel_sparsity, s (1 - (1 - done)^3) of the channels of all layers are dead: those of least mean |W|, dead
    entries included, or 0 where nothing is read. A layer keeps at least CHANNEL_FLOOR (1 - s) of its channels, and one.

    Returns:
        A boolean tensor (channels,) for each layer of `readers`, as `hidden_readers` gives it.
    """
    scores = [layer.weight.detach().double().abs().flatten(1).mean(1) for layer in readers]
    scores = [score * reads(reader, len(score)) for score, reader in zip(scores, readers.values())]
    alive = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    if not channel_sparsity:
        return alive
    left = 1 - channel_sparsity * (1 - (1 - done) ** 3)
    floors = [max(1, int(CHANNEL_FLOOR * (1 - channel_sparsity) * len(score))) for score in scores]
    return best_masks(scores, alive, round(left * sum(map(len, scores))), floors)


def _filled(layers, channels, kept):
    """Those of the channels whose filter is not empty; all where each is, so that a layer can grow.

    In a bias-free ReLU network an empty filter is dead for good: its channel is 0, where the ReLU's gradient
    is 0, so that weights that grew in it, and those that read it, would stay 0.
    """
    filled = [(kept[layer] & layer.weight.ne(0)).flatten(1).any(1) for layer in layers]
    return [
        some & alive if (some & alive).any() else alive for some, alive in zip(filled, channels)
    ]


def _places(layers, readers, channels):
    """For each of `layers` a mask without the filters of dead channels and the weights that read them."""
    places = {layer: torch.ones_like(weight_mask(layer)) for layer in layers}
    for (layer, reader), alive in zip(readers.items(), channels):
        places[layer] &= alive.reshape(-1, *[1] * (layer.weight.ndim - 1))
        if reader in places:  # a classifier that stays dense has no mask
            columns = alive.repeat_interleave(reader.weight.shape[1] // len(alive))
            places[reader] &= columns.reshape(-1, *[1] * (reader.weight.ndim - 2))
    return list(places.values())


def dense_gradients(layers, batch_loss):
    """The gradients of the layers' free weights, dead entries included.

    While the masks are opened the dead entries are still 0, so that the loss is that of the masked network. Under weight
    normalization the gradient at an entry V = 0 is (g / ||V||) dL/dW: within a layer it ranks as that of W.
    """
    masks = [weight_mask(layer) for layer in layers]
    closed = [mask.clone() for mask in masks]
    for mask in masks:
        mask.fill_(True)
    try:
        return torch.autograd.grad(batch_loss(), [free_weight(layer) for layer in layers])
    finally:
        for mask, values in zip(masks, closed):
            mask.copy_(values)


def best_masks(scores, alive, count, floors=None):
    """Masks that keep the `count` best-scored of the living weights of several layers, and of each layer at least the best.

    Args:
        scores, alive: lists of tensors, one for each layer: scores, and the boolean masks so far.
        floors: of how many of each layer at least; 1 by default.
    Returns:
        A list of masks; ties go to the first weight, in the order of layers and entries.
    """
    scores = [
        score.double().masked_fill(~mask, -math.inf).flatten() for score, mask in zip(scores, alive)
    ]
    floors = floors or [1] * len(scores)
    for score, floor in zip(scores, floors):
        score[_top(score, floor)] = math.inf
    kept = _top(torch.cat(scores), max(count, sum(floors))).split([len(score) for score in scores])
    return [part.view(mask.shape) for part, mask in zip(kept, alive)]


def _top(score, count):
    """A mask of the `count` largest scores, ties to the first."""
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[score.flatten().argsort(descending=True, stable=True)[:count]] = True
    return chosen.view(score.shape)


def erk_scores(scores, density):
    """Scores whose best `density` have Erdos-Renyi-Kernel's, eps * sum(shape) / prod(shape) of a layer (Evci et al. 2020).

    A layer that this would make more than dense becomes dense, and eps, which gives the density in all, is solved again. Within
    a layer the order of `scores` stays: the k-th best of a layer that shall keep n is worth -(k - 1/2) / n, which shares out
    whole weights by rounding (Webster's rule).
    """
    raw = [sum(score.shape) / score.numel() for score in scores]
    dense = set()
    while True:
        left = density * sum(score.numel() for score in scores) - sum(
            scores[index].numel() for index in dense
        )
        eps = left / sum(
            sum(score.shape) for index, score in enumerate(scores) if index not in dense
        )
        above = {index for index, value in enumerate(raw) if index not in dense and eps * value > 1}
        if not above:
            break
        dense |= above
    worth = []
    for index, score in enumerate(scores):
        order = score.flatten().argsort(descending=True, stable=True)
        places = order.argsort().view(score.shape) + 0.5
        worth.append(
            -places.double() / (score.numel() * (1 if index in dense else eps * raw[index]))
        )
    return worth


def snip_scores(net, names, images, targets, loss):
    """|w dL/dw| of each effective weight, the gradient of its mask (Lee et al. 2019); L is the sum of the batches' losses."""
    net = copy.deepcopy(net).double().train()  # the copy's batch statistics move, not the network's
    with parametrize.cached():
        weights = [net.get_submodule(name).weight for name in names]
        gradients = [torch.zeros_like(weight) for weight in weights]
        for batch, target in zip(images.double().split(100), targets.double().split(100)):
            for total, gradient in zip(
                gradients, torch.autograd.grad(loss(net(batch), target), weights)
            ):
                total.add_(gradient)
        return [(weight * total).abs().detach() for weight, total in zip(weights, gradients)]


def synflow_scores(net, layers, input_shape):
    """w dR/dw of some layers of a network of nonnegative parameters, R the sum of its outputs at ones (Tanaka et al. 2020)."""
    with parametrize.cached():
        weights = [layer.weight for layer in layers]
        outputs = net(torch.ones(1, *input_shape, dtype=weights[0].dtype, device=weights[0].device))
        return [
            (weight * flow).detach()
            for weight, flow in zip(weights, torch.autograd.grad(outputs.sum(), weights))
        ]


def synflow_masks(net, names, density, input_shape):
    """SynFlow's masks: in 100 rounds, each scored anew, density^(k/100) of the weights stay after round k; in float64."""
    net = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()  # the effective weight g V / ||V|| becomes its absolute value too
    layers = [net.get_submodule(name) for name in names]
    size = sum(weight_mask(layer).numel() for layer in layers)
    for k in range(1, SYNFLOW_ROUNDS + 1):
        scores = synflow_scores(net, layers, input_shape)
        masks = best_masks(
            scores,
            [weight_mask(layer) for layer in layers],
            round(density ** (k / SYNFLOW_ROUNDS) * size),
        )
        for layer, mask in zip(layers, masks):
            set_mask(layer, mask)
    return masks


def _pruning_scores(net, settings, round_, input_shape):
    """The scores of each prunable layer's effective weight in a pruning round, as a list."""
    layers = prunable(net)
    if settings.prune_score == 'random':
        return _random_scores(layers.values(), _generator(settings.seed, round_, 'random'))
    if settings.rescale_neurons:
        generator = _generator(settings.seed, round_, 'rescale')
        net = rescale_neurons(
            net, lambda channels: torch.from_numpy(generator.choice(FACTORS, channels))
        )
    if settings.prune_score == 'path':
        scores = path_magnitude(net, input_shape)
        return [scores[f'{name}.weight'] for name in layers]
    return [net.get_submodule(name).weight.detach().abs() for name in layers]


def _random_scores(layers, generator):
    """A uniform draw for each weight of each layer, in their order."""
    masks = [weight_mask(layer) for layer in layers]
    return [torch.from_numpy(generator.random(mask.shape)).to(mask.device) for mask in masks]


def _generator(seed, number, purpose):
    """A generator of its own for each seed, round or step, and purpose; none of them is one of the shuffles'."""
    return np.random.default_rng(
        (seed, number, 1 + ('random', 'snip', 'grow', 'rescale').index(purpose))
    )

"""How a short message of few errors is found: straight-through rounding, then annealing.

Nothing that a message proves rests on this file. It computes in float32, and
`studies.coded.message.prove` counts again.
"""

import math
import time

import numpy as np
import torch

from conf import BadInput
from measures.pac_bayes import live_channels
from measures.tails import kl_inverse
from measures.trace import trace_layers
from studies.coded.message import (
    DESIGN_BYTES,
    DIRECT,
    DRAWN,
    EXACT,
    LEVELS,
    URN,
    Code,
    encode,
    largest_score,
    low_frequencies,
    pixels,
    write,
)

# Of a new classifier.
FREQUENCIES, MOST_FEATURES = 5, 256  # at most, along an axis and for each class
GAIN, UNITS = 2, 10
SIZE = 2.0  # root mean square of the nonzero integers that trained kernels are rounded to
# Of the fit of the classifier.
EPOCHS, BATCH, RATE = 120, 500, 0.02
PRICE = 3.5  # nats cost 3.5 times what they weigh in the bound
FULL = 0.65  # least share of zeros assumed in prices; with less, all integers end as ones
# Of the annealing.
HEAT, COLD = 1.5, 0.3  # temperature at the start, in errors, and its share at the end
COST = 1.2  # what a nat costs at temperature 1
VISIT, JUMPS = 8, 0.5  # steps in a sweep for each integer; the share of them to 0 or from it
REACH = 2.5  # a sample counts as near a limit if 2.5 steps could bring it there
KERNELS_EVERY, TRIES, HARD = 16, 10, 4000  # sweeps between moves of kernels; moves; images

PARTS = 'hidden', 'head', 'direct'  # of a classifier

# The level of each magnitude, and the nats of the sign and of the position in a level.
_LEVEL = np.searchsorted(LEVELS, np.arange(LEVELS[-1]), side='right') - 1
_EXTRA = np.log(np.diff(LEVELS)) + math.log(2) * (np.arange(len(URN)) > 0)


def initial_code(net, input_shape, classes):
    """The code of a trained network's kernels, rounded coarsely, with a classifier of zeros.

    Dead channels are left out.

    Raises:
        BadInput: `trace_layers` does not take the network, or a message cannot have its layers.
    """
    layers = trace_layers(net, input_shape)
    geometry = []
    for layer in layers[:-1]:
        stride, padding = layer.geometry.get('stride', ()), layer.geometry.get('padding', ())
        square = all(len(set(pair)) == 1 for pair in (layer.kernel.shape[2:], stride, padding))
        if square and layer.geometry['dilation'] == (1, 1):
            geometry.append((stride[0], padding[0]))
        else:
            needs = 'a message has only convolutions with square kernels and without dilation'
            raise BadInput(f'{layer.name}: {needs}')
    kernels = []
    for kernel in live_channels([layer.kernel for layer in layers]):
        if not kernel.any():
            raise BadInput(f'{type(net).__name__}: the network is zero')
        scale = SIZE / kernel[kernel != 0].square().mean().sqrt()
        kernels.append((kernel * scale).round().long())
    code = unfitted(kernels[:-1], geometry, input_shape[0], classes)
    encode(code)  # refuses what has no message
    return code


def unfitted(kernels, geometry, channels, classes, q=None):
    """The code of these kernels with a classifier of zeros, which a search fits first.

    Args:
        q: number of frequencies; None: as many as MOST_FEATURES allows.
    """
    if kernels:
        channels = len(kernels[-1])
    if q is None:
        allowed = [q for q in range(2, FREQUENCIES + 1) if channels * q * q <= MOST_FEATURES]
        q = max(allowed, default=1)
    hidden = torch.zeros(UNITS, channels, q, q, dtype=torch.int64)
    direct = torch.zeros(classes, channels, q, q, dtype=torch.int64)
    head = torch.zeros(classes, UNITS, dtype=torch.int64)
    return Code(kernels, geometry, GAIN, hidden, head, direct)


def simplified(code):
    """A code whose scores are the same up to a positive factor, and whose message is no longer.

    Common factors of a kernel are divided out, since ReLUs pass them on to the scores. Channels
    with equal kernels are merged into one, by which the next layer reads their sum.
    """
    tensors = [*code.kernels, code.hidden, code.direct]
    for layer in range(len(code.kernels)):
        kernel = tensors[layer] // max(1, math.gcd(*tensors[layer].flatten().tolist()))
        distinct, merged = kernel.flatten(1).unique(dim=0, return_inverse=True)
        readers = [layer + 1] if layer + 1 < len(code.kernels) else [-2, -1]
        sums = []
        for reader in readers:
            shape = list(tensors[reader].shape)
            shape[1] = len(distinct)
            sums.append(
                torch.zeros(shape, dtype=torch.int64).index_add_(1, merged, tensors[reader])
            )
        if max(part.abs().max() for part in sums if part.numel()) < LEVELS[-1]:
            kernel = distinct.view(-1, *kernel.shape[1:])
            for reader, part in zip(readers, sums):
                tensors[reader] = part
        tensors[layer] = kernel
    smaller = code._replace(kernels=tensors[:-2], hidden=tensors[-2], direct=tensors[-1])
    return min(smaller, code, key=lambda one: len(encode(one)))


# --------------------------------------------------------------------------------------------------
# What integers cost in a message
# --------------------------------------------------------------------------------------------------


def _counts(tensor):
    """The urn after all integers of a tensor were drawn, in units of DRAWN."""
    counts = np.array(URN) / DRAWN
    np.add.at(counts, _LEVEL[np.abs(np.asarray(tensor).ravel())], 1)
    return counts


def nats(tensor):
    """What the symbols of a tensor of integers cost, from the counts of its levels alone."""
    first, counts = torch.tensor(URN).double() / DRAWN, torch.from_numpy(_counts(tensor))
    levels = (torch.lgamma(counts) - torch.lgamma(first)).sum()
    total = torch.lgamma(counts.sum()) - torch.lgamma(first.sum())
    return float((counts - first) @ torch.from_numpy(_EXTRA) - (levels - total))


def _cost(code):
    """Nats of all symbols of a code; its message is at most two bytes longer."""
    costs = []
    write(lambda counts, symbol: costs.append(math.log(sum(counts) / counts[symbol])), code)
    return math.fsum(costs)


def _whole(tensor):
    return tensor.detach().round().clamp(1 - LEVELS[-1], LEVELS[-1] - 1)


def _prices(tensor):
    """Nats of an integer of each magnitude (128,), from the levels of a tensor as it is."""
    counts = _counts(_whole(tensor).long())
    counts[0] = max(counts[0], FULL / (1 - FULL) * counts[1:].sum())
    return torch.from_numpy((_EXTRA - np.log(counts / counts.sum()))[_LEVEL]).float()


def _price(tensor, prices):
    """What a tensor costs in nats, linear between integers."""
    magnitude = tensor.abs().clamp(max=LEVELS[-1] - 1.01)
    below = magnitude.detach().long()
    return torch.lerp(prices[below], prices[below + 1], magnitude - below).sum()


# --------------------------------------------------------------------------------------------------
# The first classifier
# --------------------------------------------------------------------------------------------------


def _fit(features, labels, classes, units, generator):
    """A classifier (hidden, head, direct) of integers, by Adam through the rounding.

    The loss is the expected error and the price of the nats. Cross-entropy is added at the
    start, where an expected error hardly has a gradient.

    Args:
        features: (m, D), of mean square 1.
    """
    m, size = features.shape
    hidden = torch.randn(units, size, generator=generator) / 2
    head = 0.7 * torch.randn(classes, units, generator=generator)
    parts = [part.requires_grad_() for part in (hidden, head, torch.zeros(classes, size))]
    sharpness = torch.tensor(math.log(0.15), requires_grad=True)  # of the softmax; it is not sent
    optimizer = torch.optim.Adam([*parts, sharpness], betas=(0.9, 0.99))
    batches = []
    for _ in range(EPOCHS):
        batches += torch.randperm(m, generator=generator).split(BATCH)
    for step, batch in enumerate(batches):
        done = step / len(batches)
        optimizer.param_groups[0]['lr'] = RATE * (1 + math.cos(math.pi * done)) / 2
        if step % 50 == 0:
            prices = [_prices(part) for part in parts]
        hidden, head, direct = parts
        if done > 0.1:  # rounded in the forward pass, the gradient passed straight through
            hidden, head, direct = (part + (_whole(part) - part.detach()) for part in parts)
        inputs = features[batch]
        outputs = inputs @ direct.T + (inputs @ hidden.T).relu() @ head.T / DIRECT
        likelihood = (outputs * sharpness.exp()).log_softmax(1).gather(1, labels[batch, None])
        loss = (1 - likelihood.exp()).mean() - max(0, 1 - done / 0.3) * likelihood.mean()
        cost = sum(_price(part, price) for part, price in zip(parts, prices)) / m
        optimizer.zero_grad()
        (loss + PRICE * min(1, 4 * done) * cost).backward()
        optimizer.step()
    return [_whole(part).long().numpy() for part in parts]


# --------------------------------------------------------------------------------------------------
# Scores, errors, and where they turn
# --------------------------------------------------------------------------------------------------


def _features(code, kernels, images):
    """What a code's classifier sees of n images through these kernels, (D, n) float32."""
    q, found = code.direct.shape[2], []
    for part in images.split(250):
        maps = low_frequencies(kernels, code.geometry, q, code.gain, pixels(part))
        found.append(maps.flatten(1))
    return torch.cat(found).T.contiguous().numpy()


def _sums(integers, inputs):
    return integers.astype(np.float32) @ inputs


def _scores(parts, features):
    """Scores (C, n) and hidden units (H, n) of features (D, n), both over DIRECT."""
    hidden, head, direct = parts
    units = np.maximum(_sums(hidden, features), 0) / DIRECT
    return _sums(head, units) + _sums(direct, features), units


def _errors(scores, labels):
    """The number of labels (m,) without the strictly largest of the scores (C, m); margins (m,)."""
    columns, others = np.arange(len(labels)), scores.copy()
    others[labels, columns] = -np.inf
    margins = scores[labels, columns] - others.max(0)
    return np.count_nonzero(margins <= 0), margins


def _limits_of_class(row, scores, labels):
    """(low, high), (m,) each: a sample is right where the class's score lies between them.

    They are inf and -inf where it is wrong at any score.
    """
    columns, own, others = np.arange(len(labels)), labels == row, scores.copy()
    label = scores[labels, columns]
    others[labels, columns] = others[row] = -np.inf
    others = others.max(0)
    low, high = np.where(own, others, -np.inf), np.where(own, np.inf, label)
    lost = ~own & (label <= others)
    low[lost], high[lost] = np.inf, -np.inf
    return low, high


def _limits_of_unit(weights, rest, labels):
    """The same for a hidden unit before its ReLU; `rest` (C, m) are the scores without it.

    Each other class overtakes the label at one value of the unit, so an interval is right.
    """
    columns = np.arange(len(labels))
    lead, slope = rest[labels, columns] - rest, weights[:, None] - weights[labels]
    lead[labels, columns] = 1
    with np.errstate(divide='ignore', invalid='ignore'):
        where = lead / slope
    low = np.where(slope < 0, where, -np.inf).max(0)
    high = np.where(slope > 0, where, np.inf).min(0)
    lost = ((slope == 0) & (lead <= 0)).any(0) | (high <= np.maximum(low, 0))
    low[low < 0] = -np.inf  # the unit may be off
    low[lost], high[lost] = np.inf, -np.inf
    return low, high


# --------------------------------------------------------------------------------------------------
# Annealing
# --------------------------------------------------------------------------------------------------


def _visit(integers, sizes, value, limits, inputs, counts, price, heat, rng):
    """Anneals the integers of value = integers @ inputs, in place.

    A step goes up or down by one, or from 0 to one of the `sizes` and back, past magnitudes that
    are rare and so cost much. It can change an error only where the value is near one of its
    limits, so the rest of the sample is left out. A sample near both counts twice, which is right:
    it cannot be beyond both.
    """
    (low, high), reach = limits, REACH * np.abs(inputs).max(0)
    below = np.flatnonzero(np.abs(value - low) < reach)
    above = np.flatnonzero(np.abs(high - value) < reach)
    gap = np.concatenate([(value - low)[below], (high - value)[above]])
    effect = np.concatenate([inputs[:, below], -inputs[:, above]], axis=1)
    errors, steps = np.count_nonzero(gap <= 0), VISIT * len(integers)
    # All that is random, drawn at once: which integer, which way, whether a jump and to what, and
    # by how much a step may be worse.
    indices = rng.integers(len(integers), size=steps).tolist()
    signs = rng.choice((-1, 1), size=steps).tolist()
    jumps = (rng.random(steps) < JUMPS).tolist()
    sizes = rng.choice(sizes, size=steps).tolist()
    allowed = (heat * rng.exponential(size=steps)).tolist()
    for step, index in enumerate(indices):
        old = int(integers[index])
        if not jumps[step]:
            new = old + signs[step]
        elif old:
            new = 0
        else:
            new = signs[step] * sizes[step]
        if abs(new) == LEVELS[-1]:
            continue
        here, there, cost = _LEVEL[abs(old)], _LEVEL[abs(new)], 0.0
        if here != there:
            ratio = (counts[here] - 1) / counts[there]
            cost = price * (_EXTRA[there] - _EXTRA[here] + math.log(ratio))
        moved = gap + (new - old) * effect[index]
        found = np.count_nonzero(moved <= 0)
        if found - errors + cost <= allowed[step]:
            gap, errors, integers[index] = moved, found, new
            counts[here] -= 1
            counts[there] += 1


def _sweep(parts, features, scores, labels, price, heat, rng):
    """Visits each hidden unit and each class once, in place; scores (C, m) are those before."""
    hidden, head, direct = parts
    counts = [_counts(part) for part in parts]
    sizes = [np.abs(part[part != 0]) if part.any() else [1] for part in parts]
    for unit in rng.permutation(len(hidden)):
        weights = head[:, unit, None].astype(np.float32) / DIRECT
        value = _sums(hidden[unit], features)
        scores -= weights * np.maximum(value, 0)
        limits = _limits_of_unit(weights[:, 0], scores, labels)
        _visit(hidden[unit], sizes[0], value, limits, features, counts[0], price, heat, rng)
        scores += weights * np.maximum(_sums(hidden[unit], features), 0)
    scores, units = _scores(parts, features)
    for row in rng.permutation(len(head)):
        limits = _limits_of_class(row, scores, labels)
        for number, part, inputs in ((2, direct, features), (1, head, units)):
            if len(inputs):
                integers, value = part[row], scores[row]
                before, costs = integers.copy(), (counts[number], price, heat)
                _visit(integers, sizes[number], value, limits, inputs, *costs, rng)
                scores[row] += _sums(integers - before, inputs)


def _move_kernels(code, parts, images, labels, margins, price, heat, rng):
    """Kernels with some integers moved by one, as the images nearest to an error suggest."""
    near = np.sort(np.argsort(np.abs(margins), kind='stable')[:HARD])
    images, labels, kernels = images[torch.from_numpy(near)], labels[near], list(code.kernels)

    def worth(kernels):
        errors, _ = _errors(_scores(parts, _features(code, kernels, images))[0], labels)
        return errors + price * sum(map(nats, kernels))

    value = worth(kernels)
    for _ in range(TRIES):
        layer = rng.integers(len(kernels))
        moved = kernels[layer].clone()
        moved.view(-1)[rng.integers(moved.numel())] += int(rng.choice((-1, 1)))
        if moved.abs().max() < LEVELS[-1]:
            tried = [*kernels[:layer], moved, *kernels[layer + 1 :]]
            found = worth(tried)
            if found - value <= heat * rng.exponential():
                kernels, value = tried, found
    return kernels


@torch.no_grad()
def search(code, images, labels, delta=0.001, seconds=120.0, sweeps=None, seed=0, hold=False):
    """Yields (share done, bound, best code so far) after each sweep over the integers.

    Simulated annealing of errors + price * nats. At the end a nat costs what it is worth in the
    bound. While it is hot it costs more, since otherwise the number of nonzero integers grows:
    there are more networks with many of them.

    Args:
        code: where it starts; a classifier of zeros is fitted first.
        images, labels: the sample, (m, C, H, W) with pixels from 0 to 1, and (m,).
        seconds, sweeps: how long it takes, in CPU seconds, or in sweeps, which repeat exactly.
        seed: of all that is random.
        hold: the kernels stay as they are.
    """
    start, m, rng = time.process_time(), len(images), np.random.default_rng(seed)
    code = code if hold else simplified(code)
    empty = code._replace(**{name: torch.zeros_like(getattr(code, name)) for name in PARTS})
    fixed = _cost(empty) - sum(map(nats, [*code.kernels, *empty[-len(PARTS) :]]))
    fixed += DESIGN_BYTES * math.log(256) - math.log(delta)
    labels = labels.long()
    targets = labels.numpy()

    def bound(errors, total):
        """By Chernoff's bound, which is 0.0001 above the exact one."""
        return kl_inverse(min(1, max(0, errors) / m), total / m)

    def prepared(kernels):
        features = _features(code, kernels, images)
        scale = math.sqrt(np.square(features).mean(dtype=float))
        if not scale:
            raise BadInput('the rounded network is zero: its features are')
        return features / scale

    kernels, features = code.kernels, prepared(code.kernels)
    parts = [getattr(code, name).flatten(1).numpy().copy() for name in PARTS]
    if not any(part.any() for part in parts):
        inputs, generator = torch.from_numpy(features.T.copy()), torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            parts = _fit(inputs, labels, len(code.direct), len(code.hidden), generator)
    least, best, sweep, share = 1.0, code, 0, 0.0
    while True:
        live = parts[0].any(1) & parts[1].any(0)  # hidden units that read something and are read
        parts[0], parts[1] = parts[0][live], parts[1][:, live]
        scores, _ = _scores(parts, features)
        errors, margins = _errors(scores, targets)
        total = fixed + sum(map(nats, [*parts, *kernels]))
        now = bound(errors, total)
        if now < least:
            hidden, head, direct = (torch.from_numpy(part.copy()) for part in parts)
            hidden, direct = (part.view(-1, *code.direct.shape[1:]) for part in (hidden, direct))
            found = Code(list(kernels), code.geometry, code.gain, hidden, head, direct)
            # What counts are the bytes of the message, which round the nats up.
            length = (len(encode(found)) + DESIGN_BYTES) * math.log(256) - math.log(delta)
            proven = bound(errors, length)
            if proven < least and largest_score(found, images.shape[1:]) < EXACT:
                least, best = proven, found
        yield share, least, best
        if share >= 1:
            return
        heat = HEAT * COLD**share
        # What a nat is worth in errors, by the slopes of the bound.
        slope = (bound(errors, total + 9) - now) / max(1e-12, bound(errors + 9, total) - now)
        price = max(slope, COST * heat)
        if kernels and not hold and sweep % KERNELS_EVERY == KERNELS_EVERY - 1:
            moved = _move_kernels(code, parts, images, targets, margins, price, heat, rng)
            tried = prepared(moved)
            tried_scores, _ = _scores(parts, tried)
            found, _ = _errors(tried_scores, targets)
            cost = price * (sum(map(nats, moved)) - sum(map(nats, kernels)))
            if found - errors + cost <= heat * rng.exponential():
                kernels, features, scores = moved, tried, tried_scores
        _sweep(parts, features, scores, targets, price, heat, rng)
        sweep += 1
        if sweeps:
            share = sweep / sweeps
        else:
            share = (time.process_time() - start) / seconds

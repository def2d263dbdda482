"""How a short message of few errors is found: straight-through rounding, then annealing of integers (docs/coded.md).

Nothing that a message proves rests on this file. It computes in float32, and `studies.coded.message.prove` counts anew.
"""

import math
import time

import numpy as np
import torch

from conf import BadInput
from measures.pac_bayes import CHOICES, kl_inverse, live_channels
from measures.trace import trace_layers
from studies.coded.message import (
    DIRECT,
    DRAWN,
    EXACT,
    LEVELS,
    URN,
    Code,
    _features,
    encode,
    largest_score,
    pixels,
    write,
)

FREQUENCIES, MOST_FEATURES, GAIN = (
    5,
    256,
    2,
)  # of a head: at most so many along an axis, at most so many a class
UNITS = 10  # hidden units that the classifier starts with
SIZE = 2.0  # root mean square of the integers, zeros aside, that trained kernels are rounded to
EPOCHS, BATCH, RATE, PRICE = (
    120,
    500,
    0.02,
    3.5,
)  # of the fit of the classifier; nats cost PRICE times what they weigh
FULL = 0.65  # share of zeros that the fit's prices assume at least, or all integers of a tensor end as ones
HEAT, COLD, COST = (
    1.5,
    0.3,
    1.2,
)  # of the annealing's start, in errors; its share at the end; what a nat costs at heat 1
VISIT, JUMPS = 8, 0.5  # steps in a sweep for each integer; share of them that go to 0, or from it
REACH = 2.5  # samples are near if so many steps could change an error
KERNELS_EVERY, TRIES, HARD = (
    16,
    10,
    4000,
)  # sweeps between moves of kernels, how many are tried, on so many images

PARTS = 'hidden', 'head', 'direct'  # of a classifier

_MAGNITUDES = np.arange(LEVELS[-1])
_LEVEL = np.searchsorted(LEVELS, _MAGNITUDES, side='right') - 1
_EXTRA = np.log(np.diff(LEVELS)) + math.log(2) * (
    np.arange(len(URN)) > 0
)  # nats of the sign and of the place in a level


def rounded(net, input_shape, classes):
    """The code whose kernels are those of a trained network, rounded coarsely, less dead channels; its classifier is zero.

    Raises:
        BadInput: `trace_layers` does not take the network, or its layers are none that a message can have.
    """
    layers = trace_layers(net, input_shape)
    for layer in layers[:-1]:
        how = layer.geometry
        pairs = layer.kernel.shape[2:], how.get('stride', ()), how.get('padding', ())
        square = all(len(set(pair)) == 1 for pair in pairs)
        if not square or how['dilation'] != (1, 1):
            raise BadInput(
                f'{layer.name}: a message has convolutions of square kernels alone, without dilation'
            )
    live = live_channels([layer.kernel for layer in layers])
    if not all(kernel.any() for kernel in live):
        raise BadInput(f'{type(net).__name__}: the network is zero')
    kernels = [
        (kernel * (SIZE / kernel[kernel != 0].square().mean().sqrt())).round().long()
        for kernel in live[:-1]
    ]
    geometry = [
        (layer.geometry['stride'][0], layer.geometry['padding'][0]) for layer in layers[:-1]
    ]
    code = unfitted(kernels, geometry, input_shape[0], classes)
    encode(code)
    return code


def unfitted(kernels, geometry, channels, classes, q=None):
    """The code of these kernels with a classifier of zeros, which a search fits first; q is chosen by its size if not given."""
    channels = len(kernels[-1]) if kernels else channels
    q = q or max(
        q for q in range(1, FREQUENCIES + 1) if q == 1 or channels * q * q <= MOST_FEATURES
    )
    hidden, head, direct = ((UNITS, channels, q, q), (classes, UNITS), (classes, channels, q, q))
    return Code(
        kernels,
        geometry,
        GAIN,
        *(torch.zeros(shape, dtype=torch.int64) for shape in (hidden, head, direct)),
    )


def _counts(tensor):
    """How often each level is in a tensor of integers, on top of what its urn starts with; in draws."""
    counts = np.array(URN) / DRAWN
    np.add.at(counts, _LEVEL[np.abs(np.asarray(tensor).ravel())], 1)
    return counts


def nats(tensor):
    """What the symbols of a tensor of integers cost in a message, from the counts of its levels alone."""
    first, counts = torch.tensor(URN) / DRAWN, torch.from_numpy(_counts(tensor))
    drawn = (
        (torch.lgamma(counts) - torch.lgamma(first.double())).sum()
        - torch.lgamma(counts.sum())
        + torch.lgamma(first.sum())
    )
    return float((counts - first) @ torch.from_numpy(_EXTRA) - drawn)


def _cost(code):
    """Nats of all symbols of a code; its message is at most two bytes longer."""
    costs = []

    def coder(counts, symbol):
        costs.append(math.log(sum(counts) / counts[symbol]))
        return symbol

    write(coder, code)
    return math.fsum(costs)


def _whole(tensor):
    return tensor.detach().round().clamp(1 - LEVELS[-1], LEVELS[-1] - 1)


def _prices(tensor):
    """(L,) nats of an integer of each magnitude, from the levels of a tensor as it is."""
    counts = _counts(_whole(tensor).long())
    counts[0] = max(counts[0], FULL / (1 - FULL) * counts[1:].sum())
    return torch.from_numpy((_EXTRA - np.log(counts / counts.sum()))[_LEVEL]).float()


def _price(tensor, prices):
    """What a tensor costs in nats, linear between integers."""
    magnitude = tensor.abs().clamp(max=LEVELS[-1] - 1.01)
    below = magnitude.detach().long()
    return torch.lerp(prices[below], prices[below + 1], magnitude - below).sum()


def _fit(features, labels, classes, units, generator):
    """Classifier (hidden, head, direct) of integers: expected error and nats, descended by Adam through the rounding.

    Cross-entropy is added at the start, where an expected error hardly has a gradient.

    Args:
        features: (m, D), of mean square 1.
    """
    m, size = features.shape
    hidden, head = (
        torch.randn(units, size, generator=generator) / 2,
        0.7 * torch.randn(classes, units, generator=generator),
    )
    parts = [part.requires_grad_() for part in (hidden, head, torch.zeros(classes, size))]
    sharpness = torch.tensor(math.log(0.15), requires_grad=True)  # of the softmax; it is not sent
    optimizer = torch.optim.Adam([*parts, sharpness], betas=(0.9, 0.99))
    steps = [
        batch
        for _ in range(EPOCHS)
        for batch in torch.randperm(m, generator=generator).split(BATCH)
    ]
    for step, batch in enumerate(steps):
        done = step / len(steps)
        optimizer.param_groups[0]['lr'] = RATE * (1 + math.cos(math.pi * done)) / 2
        if step % 50 == 0:
            prices = [_prices(part) for part in parts]
        hidden, head, direct = (
            part + (_whole(part) - part.detach()) * (done > 0.1) for part in parts
        )
        outputs = features[batch] @ direct.T + (features[batch] @ hidden.T).relu() @ head.T / DIRECT
        likelihood = (outputs * sharpness.exp()).log_softmax(1).gather(1, labels[batch, None])
        loss = (1 - likelihood.exp()).mean() - max(0, 1 - done / 0.3) * likelihood.mean()
        cost = sum(_price(part, price) for part, price in zip(parts, prices)) / m
        optimizer.zero_grad()
        (loss + PRICE * min(1, 4 * done) * cost).backward()
        optimizer.step()
    return [_whole(part).long().numpy() for part in parts]


def _features_of(code, kernels, images):
    """(D, n) float32 array, what the classifier of a code sees of n images through these kernels."""
    q = code.direct.shape[2]
    parts = [
        _features(kernels, code.geometry, q, code.gain, pixels(part)).flatten(1)
        for part in images.split(250)
    ]
    return torch.cat(parts).T.contiguous().numpy()


def _sums(integers, inputs):
    return integers.astype(np.float32) @ inputs


def _scores(parts, features):
    """(C, n) of features (D, n), over DIRECT; and (H, n) the hidden units, over DIRECT."""
    hidden, head, direct = parts
    units = np.maximum(_sums(hidden, features), 0) / DIRECT
    return _sums(head, units) + _sums(direct, features), units


def _errors(scores, labels):
    """How many labels (m,) have not the largest score alone, in scores (C, m); and (m,) by how much each leads the others."""
    columns, others = np.arange(len(labels)), scores.copy()
    others[labels, columns] = -np.inf
    margins = scores[labels, columns] - others.max(0)
    return np.count_nonzero(margins <= 0), margins


def _limits_of_class(row, scores, labels):
    """(low, high), (m,) each: where a class's score must lie between for a sample to be right; inf, -inf if it is lost."""
    columns, own, others = np.arange(len(labels)), labels == row, scores.copy()
    label = scores[labels, columns]
    others[labels, columns] = others[row] = -np.inf
    others = others.max(0)
    low, high = np.where(own, others, -np.inf), np.where(own, np.inf, label)
    lost = ~own & (label <= others)
    low[lost], high[lost] = np.inf, -np.inf
    return low, high


def _limits_of_unit(weights, rest, labels):
    """The same for a hidden unit before its ReLU, from its weights (C,) and the scores without it (C, m).

    Each other class overtakes the label at one value of the unit, so the right values are an interval.
    """
    columns = np.arange(len(labels))
    lead, slope = rest[labels, columns] - rest, weights[:, None] - weights[labels]
    lead[labels, columns] = 1
    with np.errstate(divide='ignore', invalid='ignore'):
        where = lead / slope
    low, high = (
        np.where(slope < 0, where, -np.inf).max(0),
        np.where(slope > 0, where, np.inf).min(0),
    )
    lost = ((slope == 0) & (lead <= 0)).any(0) | (high <= np.maximum(low, 0))
    low[low < 0] = -np.inf  # the unit may be off
    low[lost], high[lost] = np.inf, -np.inf
    return low, high


def _visit(integers, sizes, value, limits, inputs, counts, price, heat, rng):
    """Anneals the integers of value = integers @ inputs, in place: single steps, if they cost no more than heat allows.

    A step goes up or down by one, or from 0 to one of the `sizes` and back, past sizes that are rare and so cost much. It
    can change an error only where the value is near one of its limits; the rest of the sample is left out. A sample near
    both counts twice, and rightly: it cannot be beyond both.
    """
    (low, high), reach = limits, REACH * np.abs(inputs).max(0)
    below, above = (
        np.flatnonzero(np.abs(value - low) < reach),
        np.flatnonzero(np.abs(high - value) < reach),
    )
    gap = np.concatenate([(value - low)[below], (high - value)[above]])
    effect = np.concatenate([inputs[:, below], -inputs[:, above]], axis=1)
    errors, steps = np.count_nonzero(gap <= 0), VISIT * len(integers)
    drawn = (
        rng.integers(len(integers), size=steps),
        rng.choice((-1, 1), size=steps),
        rng.random(steps) < JUMPS,
    )
    drawn = *drawn, rng.choice(sizes, size=steps), heat * rng.exponential(size=steps)
    for place, sign, jump, size, allowed in zip(*(column.tolist() for column in drawn)):
        old = int(integers[place])
        new = (0 if old else sign * size) if jump else old + sign
        if abs(new) == LEVELS[-1]:
            continue
        here, there, cost = _LEVEL[abs(old)], _LEVEL[abs(new)], 0.0
        if here != there:
            cost = price * (
                _EXTRA[there] - _EXTRA[here] + math.log((counts[here] - 1) / counts[there])
            )
        moved = gap + (new - old) * effect[place]
        found = np.count_nonzero(moved <= 0)
        if found - errors + cost <= allowed:
            gap, errors, integers[place] = moved, found, new
            counts[here] -= 1
            counts[there] += 1


def _sweep(parts, features, scores, labels, price, heat, rng):
    """Visits each hidden unit and each class once, in place; scores (C, m) are those of the parts before."""
    hidden, head, direct = parts
    counts = [_counts(part) for part in parts]
    sizes = [np.abs(part[part != 0]) if part.any() else [1] for part in parts]
    for unit in rng.permutation(len(hidden)):
        weights, value = (
            head[:, unit, None].astype(np.float32) / DIRECT,
            _sums(hidden[unit], features),
        )
        scores -= weights * np.maximum(value, 0)
        limits = _limits_of_unit(weights[:, 0], scores, labels)
        _visit(hidden[unit], sizes[0], value, limits, features, counts[0], price, heat, rng)
        scores += weights * np.maximum(_sums(hidden[unit], features), 0)
    scores, units = _scores(parts, features)
    for row in rng.permutation(len(head)):
        limits = _limits_of_class(row, scores, labels)
        for number, part, inputs in ((2, direct, features), (1, head, units)):
            if len(inputs):
                before = part[row].copy()
                _visit(
                    part[row],
                    sizes[number],
                    scores[row],
                    limits,
                    inputs,
                    counts[number],
                    price,
                    heat,
                    rng,
                )
                scores[row] += _sums(part[row] - before, inputs)


def _move_kernels(code, parts, images, labels, margins, price, heat, rng):
    """Kernels with some integers moved by one, as far as the images nearest to an error tell that it pays."""
    near = np.sort(np.argsort(np.abs(margins), kind='stable')[:HARD])
    images, labels, kernels = images[torch.from_numpy(near)], labels[near], list(code.kernels)

    def worth(kernels):
        errors, _ = _errors(_scores(parts, _features_of(code, kernels, images))[0], labels)
        return errors + price * sum(map(nats, kernels))

    value = worth(kernels)
    for _ in range(TRIES):
        layer = rng.integers(len(kernels))
        moved = kernels[layer].clone()
        moved.view(-1)[rng.integers(moved.numel())] += int(rng.choice((-1, 1)))
        if moved.abs().max() < LEVELS[-1]:
            tried = [*kernels[:layer], moved, *kernels[layer + 1 :]]
            if (found := worth(tried)) - value <= heat * rng.exponential():
                kernels, value = tried, found
    return kernels


@torch.no_grad()
def search(code, images, labels, delta=0.001, seconds=120.0, sweeps=None, seed=0, hold=False):
    """Yields (share done, bound, code): the best code so far, each time a sweep over its integers is done, for so long.

    Simulated annealing of errors + price * nats. At the end a nat is worth what it is worth in the bound. In the heat
    it costs more, so that the number of nonzero integers does not grow by their mere number of places.

    Args:
        code: where it starts; a classifier of zeros is fitted first.
        images, labels: the sample, (m, C, H, W) with pixels between 0 and 1, and (m,) int64.
        seconds, sweeps: how long it takes, in CPU seconds; with a number of sweeps the same numbers come out each time.
        seed: of all that is random.
        hold: the kernels stay as they are.
    """
    start, m, rng = time.process_time(), len(images), np.random.default_rng(seed)
    empty = code._replace(**{name: torch.zeros_like(getattr(code, name)) for name in PARTS})
    fixed = _cost(empty) - sum(map(nats, [*code.kernels, *empty[-len(PARTS) :]]))
    targets = labels.numpy()

    def bound(errors, total):
        return kl_inverse(min(1, max(0, errors) / m), (total + math.log(CHOICES / delta)) / m)

    def prepared(kernels):
        features = _features_of(code, kernels, images)
        scale = math.sqrt(np.square(features).mean(dtype=float))
        if not scale:
            raise BadInput('the rounded network is zero: its features are')
        return features / scale

    kernels, features = code.kernels, prepared(code.kernels)
    parts = [getattr(code, name).flatten(1).numpy().copy() for name in PARTS]
    if not any(part.any() for part in parts):
        with torch.enable_grad():
            generator = torch.Generator().manual_seed(seed)
            parts = _fit(
                torch.from_numpy(features.T.copy()),
                labels,
                len(code.direct),
                len(code.hidden),
                generator,
            )
    best, sweep, share = (1.0, code), 0, 0.0
    while True:
        live = parts[0].any(1) & parts[1].any(0)
        parts[0], parts[1] = parts[0][live], parts[1][:, live]
        scores, _ = _scores(parts, features)
        errors, margins = _errors(scores, targets)
        total = fixed + sum(map(nats, [*parts, *kernels]))
        now = bound(errors, total)
        if now < best[0]:
            hidden, head, direct = (torch.from_numpy(part.copy()) for part in parts)
            shape = code.direct.shape[1:]
            found = Code(
                list(kernels),
                code.geometry,
                code.gain,
                hidden.view(-1, *shape),
                head,
                direct.view(-1, *shape),
            )
            best = (now, found) if largest_score(found, images.shape[1:]) < EXACT else best
        yield share, *best
        if share >= 1:
            return
        heat = HEAT * COLD**share
        slope = (bound(errors, total + 9) - now) / max(1e-12, bound(errors + 9, total) - now)
        price = max(slope, COST * heat)
        if kernels and not hold and sweep % KERNELS_EVERY == KERNELS_EVERY - 1:
            moved = _move_kernels(code, parts, images, targets, margins, price, heat, rng)
            tried = prepared(moved)
            tried_scores, _ = _scores(parts, tried)
            found, _ = _errors(tried_scores, targets)
            if (
                found - errors + price * (sum(map(nats, moved)) - sum(map(nats, kernels)))
                <= heat * rng.exponential()
            ):
                kernels, features, scores = moved, tried, tried_scores
        _sweep(parts, features, scores, targets, price, heat, rng)
        sweep += 1
        share = sweep / sweeps if sweeps else (time.process_time() - start) / seconds

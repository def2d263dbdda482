"""How a short message of few errors is found: straight-through rounding, then annealing of integers (docs/coded.md).

Nothing that a message proves rests on this file. It computes in float32, and `measures.coded.prove` counts anew.
"""

import math
import time

import numpy as np
import torch

from conf import BadInput
from measures.coded import DRAWN, LEVELS, URN, Code, _features, encode, pixels
from measures.geometry import trace_layers
from measures.pac_bayes import CHOICES, kl_inverse, live_channels

FREQUENCIES, MOST_FEATURES, GAIN = 5, 256, 2  # of a head: at most so many along an axis, at most so many a class
SIZE = 2.0  # root mean square of the integers, zeros aside, that trained kernels are rounded to
EPOCHS, BATCH, RATE, PRICE = 24, 500, 0.02, 4.0  # of the fit of the head; nats cost PRICE times what they weigh
HEAT, COST = 2.2, 1.2  # of the annealing's start, in errors; what a nat costs at heat 1
VISIT, REACH = 8, 1.5  # steps in a sweep for each integer; samples are near if so many steps could change an error
KERNELS_EVERY, TRIES, HARD = 16, 10, 4000  # sweeps between moves of kernels, how many are tried, on so many images

_MAGNITUDES = np.arange(LEVELS[-1])
_LEVEL = np.searchsorted(LEVELS, _MAGNITUDES, side='right') - 1
_EXTRA = np.log(np.diff(LEVELS)) + math.log(2) * (np.arange(len(URN)) > 0)  # nats of the sign and of the place in a level


def rounded(net, input_shape, classes):
    """The code whose kernels are those of a trained network, rounded coarsely, less dead channels; its head is zero.

    Raises:
        BadInput: `trace_layers` does not take the network, or its layers are none that a message can have.
    """
    layers = trace_layers(net, input_shape)
    for layer in layers[:-1]:
        square = all(len(set(pair)) == 1 for pair in (layer.shape[2:], layer.stride, layer.padding))
        if not isinstance(layer.module, torch.nn.Conv2d) or not square or layer.dilation != (1, 1):
            raise BadInput(f'{layer.name}: a message has convolutions of square kernels alone, without dilation')
    live = live_channels([layer.module.weight.detach().double().view(layer.shape) for layer in layers])
    if not all(kernel.any() for kernel in live):
        raise BadInput(f'{type(net).__name__}: the network is zero')
    kernels = [(kernel * (SIZE / kernel[kernel != 0].square().mean().sqrt())).round().long() for kernel in live[:-1]]
    geometry = [(layer.stride[0], layer.padding[0]) for layer in layers[:-1]]
    channels = len(kernels[-1]) if kernels else input_shape[0]
    q = max(q for q in range(1, FREQUENCIES + 1) if q == 1 or channels * q * q <= MOST_FEATURES)
    code = Code(kernels, geometry, torch.zeros(classes, channels, q, q, dtype=torch.int64), GAIN)
    encode(code)
    return code


def _counts(tensor):
    """How often each level is in a tensor of integers, on top of what its urn starts with; in draws."""
    counts = np.array(URN) / DRAWN
    np.add.at(counts, _LEVEL[np.abs(np.asarray(tensor).ravel())], 1)
    return counts


def nats(tensor):
    """What the symbols of a tensor of integers cost in a message, from the counts of its levels alone."""
    first, counts = torch.tensor(URN) / DRAWN, torch.from_numpy(_counts(tensor))
    drawn = (torch.lgamma(counts) - torch.lgamma(first.double())).sum() - torch.lgamma(counts.sum()) + torch.lgamma(first.sum())
    return float((counts - first) @ torch.from_numpy(_EXTRA) - drawn)


def _fit(features, labels, classes, generator):
    """A head (C, D) of integers: expected error and nats, descended by Adam through the rounding.

    Args:
        features: (m, D), of mean square 1.
    """
    m, head = len(features), torch.zeros(classes, features.shape[1], requires_grad=True)
    sharpness = torch.tensor(math.log(0.15), requires_grad=True)  # of the softmax; it is not sent
    optimizer = torch.optim.Adam([head, sharpness], betas=(0.9, 0.99))
    steps = [batch for _ in range(EPOCHS) for batch in torch.randperm(m, generator=generator).split(BATCH)]
    for step, batch in enumerate(steps):
        done = step / len(steps)
        optimizer.param_groups[0]['lr'] = RATE * (1 + math.cos(math.pi * done)) / 2
        if step % 50 == 0:
            counts = _counts(head.detach().round().clamp(1 - LEVELS[-1], LEVELS[-1] - 1).long())
            prices = torch.from_numpy((_EXTRA - np.log(counts / counts.sum()))[_LEVEL]).float()
        integers = head + (head.detach().round() - head.detach()) * (done > 0.1)
        outputs = features[batch] @ integers.T * sharpness.exp()
        error = 1 - outputs.softmax(1).gather(1, labels[batch, None]).mean()
        magnitude = head.abs().clamp(max=LEVELS[-1] - 1.01)
        below = magnitude.detach().long()
        cost = torch.lerp(prices[below], prices[below + 1], magnitude - below).sum() / m
        optimizer.zero_grad()
        (error + PRICE * min(1, 4 * done) * cost).backward()
        optimizer.step()
    return head.detach().round().clamp(1 - LEVELS[-1], LEVELS[-1] - 1).long()


def _features_of(code, kernels, images):
    """(D, n) float32 array, what the head of a code sees of n images through these kernels."""
    q = code.head.shape[2]
    parts = [_features(kernels, code.geometry, q, code.gain, pixels(part)).flatten(1) for part in images.split(250)]
    return torch.cat(parts).T.contiguous().numpy()


def _margins(head, features, labels):
    """(m,) the label's score less the largest of the others."""
    scores, columns = head.astype(np.float32) @ features, np.arange(len(labels))
    own = scores[labels, columns]
    scores[labels, columns] = -np.inf
    return own - scores.max(0)


def _visit(row, head, scores, features, largest, labels, counts, price, heat, rng):
    """Anneals one class's integers, in place: single steps of one, kept if they do not cost more than heat allows.

    A step can only change an error where the label is ahead of all classes but this one, or is this one; and only where
    this class's score is near the one that it is compared with. The rest of the sample is left out.
    """
    columns, own = np.arange(len(labels)), labels == row
    mine = scores[row].copy()
    label = scores[labels, columns]
    scores[row] = scores[labels, columns] = -np.inf
    others = scores.max(0)
    scores[labels, columns], scores[row] = label, mine
    gap = np.where(own, mine - others, label - mine)
    near = np.flatnonzero((np.abs(gap) < REACH * largest) & (own | (label > others)))
    effect = features[:, near] * np.where(own[near], 1, -1).astype(np.float32)
    gap, before, integers = gap[near], head[row].copy(), head[row]
    errors, steps = np.count_nonzero(gap <= 0), VISIT * len(integers)
    places, signs = rng.integers(len(integers), size=steps), rng.integers(2, size=steps) * 2 - 1
    for place, sign, allowed in zip(places.tolist(), signs.tolist(), (heat * rng.exponential(size=steps)).tolist()):
        old, new = integers[place], integers[place] + sign
        if abs(new) == LEVELS[-1]:
            continue
        here, there, cost = _LEVEL[abs(old)], _LEVEL[abs(new)], 0.0
        if here != there:
            cost = price * (_EXTRA[there] - _EXTRA[here] + math.log((counts[here] - 1) / counts[there]))
        moved = gap + effect[place] if sign > 0 else gap - effect[place]
        found = np.count_nonzero(moved <= 0)
        if found - errors + cost <= allowed:
            gap, errors, integers[place] = moved, found, new
            counts[here] -= 1
            counts[there] += 1
    changed = np.flatnonzero(integers != before)
    scores[row] += (integers - before)[changed].astype(np.float32) @ features[changed]


def _move_kernels(code, head, images, labels, margins, price, heat, rng):
    """Kernels with some integers moved by one, as far as the images nearest to an error tell that it pays."""
    near = np.sort(np.argsort(np.abs(margins), kind='stable')[:HARD])
    images, labels, kernels = images[torch.from_numpy(near)], labels[near], list(code.kernels)

    def worth(kernels):
        errors = np.count_nonzero(_margins(head, _features_of(code, kernels, images), labels) <= 0)
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
        code: where it starts; a head of zeros is fitted first.
        images, labels: the sample, (m, C, H, W) with pixels between 0 and 1, and (m,) int64.
        seconds, sweeps: how long it takes, in CPU seconds; with a number of sweeps the same numbers come out each time.
        seed: of all that is random.
        hold: the kernels stay as they are.
    """
    start, m, rng = time.process_time(), len(images), np.random.default_rng(seed)
    classes, fixed = len(code.head), len(encode(code._replace(head=torch.zeros_like(code.head)))) * 8 * math.log(2)
    fixed -= sum(map(nats, code.kernels)) + nats(torch.zeros_like(code.head))
    targets = labels.numpy()

    def bound(errors, total):
        return kl_inverse(min(1, max(0, errors) / m), (total + math.log(CHOICES / delta)) / m)

    def prepared(kernels):
        features = _features_of(code, kernels, images)
        scale = math.sqrt(np.square(features).mean(dtype=float))
        if not scale:
            raise BadInput('the rounded network is zero: its features are')
        features /= scale
        return features, np.abs(features).max(0)

    kernels, (features, largest) = code.kernels, prepared(code.kernels)
    head = code.head.flatten(1).numpy().copy()
    if not head.any():
        with torch.enable_grad():
            head = _fit(torch.from_numpy(features).T.contiguous(), labels, classes, torch.Generator().manual_seed(seed)).numpy()
    best, sweep, share = (1.0, code), 0, 0.0
    while True:
        margins = _margins(head, features, targets)
        errors, total = np.count_nonzero(margins <= 0), fixed + nats(head) + sum(map(nats, kernels))
        now = bound(errors, total)
        if now < best[0]:
            best = now, code._replace(kernels=list(kernels), head=torch.from_numpy(head.copy()).view(code.head.shape))
        yield share, *best
        if share >= 1:
            return
        heat = HEAT * (1 - share) ** 2
        slope = (bound(errors, total + 9) - now) / max(1e-12, bound(errors + 9, total) - now)
        price = max(slope, COST * heat)
        if kernels and not hold and sweep % KERNELS_EVERY == KERNELS_EVERY - 1:
            moved = _move_kernels(code, head, images, targets, margins, price, heat, rng)
            tried = prepared(moved)
            found = np.count_nonzero(_margins(head, tried[0], targets) <= 0)
            if found - errors + price * (sum(map(nats, moved)) - sum(map(nats, kernels))) <= heat * rng.exponential():
                kernels, (features, largest) = moved, tried
        scores, counts = head.astype(np.float32) @ features, _counts(head)
        for row in rng.permutation(classes):
            _visit(row, head, scores, features, largest, targets, counts, price, heat, rng)
        sweep += 1
        share = sweep / sweeps if sweeps else (time.process_time() - start) / seconds

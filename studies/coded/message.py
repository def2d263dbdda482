"""A network as a message of a few hundred bytes, and the true error that it proves; docs/coded.md has statement and proof.

A message decodes to a network of integers: convolutions of integer kernels with ReLUs, and a classifier that reads low
frequencies of the last maps, directly and through hidden units. Everything that the theorem rests on, `decode` and
`prove`, computes with integers.
"""

import bisect
import math
from collections import namedtuple

import torch
import torch.nn.functional as F

from conf import BadInput
from measures.pac_bayes import CHOICES
from measures.trace import Layer, sequential

# kernels: list of (out, in, k, k) int64 tensors; geometry: (stride, padding) of each; gain: which of GAINS powers of the
# frequency the features are multiplied by. The classifier, int64: hidden (H, channels, q, q), the units that read the
# features; head (C, H), what the classes make of these units; direct (C, channels, q, q), what they make of the features.
Code = namedtuple('Code', 'kernels geometry gain hidden head direct')
Proof = namedtuple('Proof', 'bound errors code')

DEPTHS, WIDTHS, SIZES, STRIDES, PADDINGS, FREQUENCIES, GAINS, UNITS = (
    8,
    64,
    8,
    4,
    4,
    8,
    4,
    64,
)  # so many choices of each
DIRECT = 3  # what the direct part of a score is multiplied by: a hidden unit is about so many times as large as a feature
LEVELS = (
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    32,
    64,
    128,
)  # magnitudes from one of these to below the next share a symbol
URN = 64, 64, 32, 16, 8, 4, 2, 1, 1  # what an urn of these symbols starts with
DRAWN = 64  # what is added of a symbol that was drawn
LONGEST = 4096  # bytes of a message
EXACT = 2**53  # scores are below it, so that float64 computes them without an error, too


# ----------------------------------------------------------------------------------------------------------------------
# The message
# ----------------------------------------------------------------------------------------------------------------------


class _Writer:
    """The interval of [0, 1) that a sequence of symbols narrows down to: [low, low + width) / whole, in integers."""

    def __init__(self):
        self.low, self.width, self.whole = 0, 1, 1

    def __call__(self, counts, symbol):
        """Narrows it to the share of a symbol, whose probability is counts[symbol] / sum(counts)."""
        self.low = self.low * sum(counts) + self.width * sum(counts[:symbol])
        self.width *= counts[symbol]
        self.whole *= sum(counts)
        return symbol

    def message(self):
        """The shortest string of bytes such that every real number that begins with them lies in the interval."""
        length = (
            max(0, self.whole.bit_length() - self.width.bit_length() - 1) // 8
        )  # 256^-length is not below its width
        while True:
            number = -(-self.low * 256**length // self.whole)
            if (number + 1) * self.whole <= (self.low + self.width) * 256**length:
                return number.to_bytes(length, 'big')
            length += 1


class _Reader:
    """The symbols in whose interval all numbers lie that begin with a message."""

    def __init__(self, message):
        self.number, self.left, self.whole = int.from_bytes(message, 'big'), 256 ** len(message), 1

    def __call__(self, counts, symbol=None):
        total, below, symbol = sum(counts), 0, 0
        place = self.number * total // self.left
        while below + counts[symbol] <= place:
            below += counts[symbol]
            symbol += 1
        self.number = self.number * total - self.left * below
        self.left, self.whole = self.left * counts[symbol], self.whole * total
        if self.left < self.whole:
            raise BadInput('ends before its network does')
        return symbol


def _uniform(coder, choices, value=None):
    return coder([1] * choices, value)


def _integer(coder, urn, value=None):
    """An integer below LEVELS[-1] in magnitude: its level from the urn, then its sign and its place in the level."""
    level = coder(urn, None if value is None else bisect.bisect(LEVELS, abs(value)) - 1)
    urn[level] += DRAWN
    if level == 0:
        return 0
    sign = _uniform(coder, 2, None if value is None else int(value < 0))
    low, high = LEVELS[level : level + 2]
    magnitude = low + _uniform(coder, high - low, None if value is None else abs(value) - low)
    return -magnitude if sign else magnitude


def _tensor(coder, shape, tensor=None):
    """A tensor of integers, all from one urn, whose counts learn from those that were drawn before."""
    urn = list(URN)
    values = [None] * math.prod(shape) if tensor is None else tensor.flatten().tolist()
    return torch.tensor([_integer(coder, urn, value) for value in values], dtype=torch.int64).view(
        shape
    )


def _transcribe(coder, channels, classes, code=None):
    """Writes a code, or reads one where there is none yet; one function for both, so that they fit."""
    depth = _uniform(coder, DEPTHS, code and len(code.kernels))
    geometries, kernels, geometry = [1] * (SIZES * STRIDES * PADDINGS), [], []
    for layer in range(depth):
        kernel = places = None
        if code:
            kernel, (stride, padding) = code.kernels[layer], code.geometry[layer]
            places = (kernel.shape[2] - 1) * STRIDES * PADDINGS + (stride - 1) * PADDINGS + padding
        places = coder(geometries, places)
        geometries[places] += len(geometries)
        size, stride, padding = (
            places // (STRIDES * PADDINGS) + 1,
            places // PADDINGS % STRIDES + 1,
            places % PADDINGS,
        )
        width = _uniform(coder, WIDTHS, code and len(kernel) - 1) + 1
        shape = width, channels, size, size
        kernels.append(_tensor(coder, shape, kernel))
        geometry.append((stride, padding))
        channels = width
    q = _uniform(coder, FREQUENCIES, code and code.direct.shape[2] - 1) + 1
    gain = _uniform(coder, GAINS, code and code.gain)
    units = _uniform(coder, UNITS, code and len(code.hidden))
    hidden = _tensor(coder, (units, channels, q, q), code and code.hidden)
    head = _tensor(coder, (classes, units), code and code.head)
    direct = _tensor(coder, (classes, channels, q, q), code and code.direct)
    return Code(kernels, geometry, gain, hidden, head, direct)


def write(coder, code):
    """Gives a coder, a function of (counts, symbol), each symbol of a code."""
    _transcribe(
        coder, (code.kernels[0] if code.kernels else code.direct).shape[1], len(code.direct), code
    )


def encode(code):
    """The message of a code, as bytes. Raises BadInput where it has no message: more layers, larger integers, ..."""
    if any(
        not (1 <= stride <= STRIDES and 0 <= padding < PADDINGS)
        for stride, padding in code.geometry
    ):
        raise BadInput(
            f'a network whose strides are not 1 to {STRIDES}, or its paddings not 0 to {PADDINGS - 1}'
        )
    coder = _Writer()
    try:
        write(coder, code)
    except IndexError:
        raise BadInput('a network that is too large for a message') from None
    message = coder.message()
    if len(message) > LONGEST:
        raise BadInput(f'a network whose message has {len(message)} bytes, more than {LONGEST}')
    return message


def decode(message, channels, classes):
    """The code of a message about images of so many channels and so many classes. Raises BadInput where it is none."""
    if len(message) > LONGEST:
        raise BadInput(f'has {len(message)} bytes, and a message at most {LONGEST}')
    code = _transcribe(_Reader(message), channels, classes)
    if encode(code) != message:
        raise BadInput('goes on after its network, or is not the shortest message of it')
    return code


# ----------------------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------------------


def _cosines(n, q):
    """The first q rows of the discrete cosine transform of n points, (q, n), times 16 and rounded. No entry is near a half."""
    return torch.tensor(
        [[round(16 * math.cos(math.pi * (i + 0.5) * u / n)) for i in range(n)] for u in range(q)]
    )


def _gains(q, gain):
    """What the features of frequency (u, v) are multiplied by, (q, q): 4 (1 + u + v)^(gain / 2), rounded down."""
    return torch.tensor(
        [[math.isqrt(16 * (1 + u + v) ** gain) for v in range(q)] for u in range(q)]
    )


def _convolve(maps, kernel, stride, padding):
    """F.conv2d, for integers too."""
    if maps.is_floating_point():
        return F.conv2d(maps, kernel.to(maps.dtype), None, stride, padding)
    size = kernel.shape[2]
    maps = F.pad(maps, (padding,) * 4)
    windows = maps.unfold(2, size, stride).unfold(3, size, stride)
    out = maps.new_zeros(len(maps), len(kernel), *windows.shape[2:4])
    for o, i, a, b in kernel.nonzero().tolist():
        out[:, o].add_(windows[:, i, :, :, a, b], alpha=int(kernel[o, i, a, b]))
    return out


def _frequencies(maps, tables, gain):
    """(N, channels, q, q) of maps (N, channels, n, n'), by tables of cosines (q, n) and (q, n')."""
    vertical, horizontal = (table.to(maps.dtype) for table in tables)
    return ((maps @ horizontal.T).mT @ vertical.T).mT * _gains(len(vertical), gain).to(maps.dtype)


def _features(kernels, geometry, q, gain, maps):
    """(N, channels, q, q): the low frequencies of the last maps that the kernels make of maps (N, C, H, W)."""
    for kernel, where in zip(kernels, geometry):
        maps = _convolve(maps, kernel, *where).relu()
    return _frequencies(maps, (_cosines(n, q) for n in maps.shape[2:]), gain)


def pixels(images):
    """The integers from 0 to 255 that a network of a message sees, of images with pixels between 0 and 1."""
    if images.dim() != 4 or not len(images) or not (images.min() >= 0 and images.max() <= 1):
        raise BadInput(
            f'images of shape {tuple(images.shape)}: must be (m, C, H, W), at least one, with pixels from 0 to 1'
        )
    return (255 * images).round()


def largest_score(code, input_shape):
    """An upper bound, a float, of all scores and of their partial sums on images of this shape: absolute weights, white image.

    Raises:
        BadInput: a kernel, or the frequencies, are larger than the maps.
    """
    maps = torch.full((1, *input_shape), 255.0, dtype=torch.float64)
    for kernel, (stride, padding) in zip(code.kernels, code.geometry):
        if min(maps.shape[2:]) + 2 * padding < kernel.shape[2]:
            raise BadInput(
                f'a network with a kernel of {tuple(kernel.shape[2:])}, which is larger than its maps'
            )
        maps = _convolve(maps, kernel.abs(), stride, padding)
    size, q = maps.shape[2:], code.direct.shape[2]
    if min(size) < q:
        raise BadInput(
            f'a network whose last maps are {size[0]}x{size[1]}, which have no {q}x{q} frequencies'
        )
    features = _frequencies(maps, (_cosines(n, q).abs() for n in size), code.gain).flatten()
    hidden, head, direct = (part.abs().double().flatten(1) for part in code[-3:])
    return (DIRECT * direct @ features + head @ (hidden @ features)).max().item() * (
        1 + 1e-9
    )  # its own rounding


@torch.no_grad()
def scores(code, images):
    """(N, C) int64: what the network of a code makes of images (N, C, H, W) with pixels between 0 and 1, in integers.

    Raises:
        BadInput: the images do not fit the code, or a score could exceed 2^53.
    """
    if largest_score(code, images.shape[1:]) >= EXACT:
        raise BadInput('a network whose scores could exceed 2^53')
    q, hidden, direct = (
        code.direct.shape[2],
        code.hidden.flatten(1),
        DIRECT * code.direct.flatten(1),
    )
    parts = (
        _features(code.kernels, code.geometry, q, code.gain, part.long())
        for part in pixels(images).split(200)
    )
    parts = (part.flatten(1) for part in parts)
    return torch.cat([part @ direct.T + (part @ hidden.T).relu() @ code.head.T for part in parts])


def coded_network(code, input_shape):
    """The network of a code as an nn.Sequential in float64, to be fed 255 x; its outputs are the same integers.

    The direct part of the scores passes the last ReLU in two halves, as direct = relu(direct) - relu(-direct).
    """
    layers, size = [], input_shape[1:]
    for kernel, (stride, padding) in zip(code.kernels, code.geometry):
        layers.append(Layer(kernel.double(), None, True, {'stride': stride, 'padding': padding}))
        size = [(n + 2 * padding - kernel.shape[2]) // stride + 1 for n in size]
    q, classes = code.direct.shape[2], torch.eye(len(code.direct), dtype=torch.int64)
    vertical, horizontal = (_cosines(n, q) for n in size)
    units = torch.cat([code.hidden, code.direct, -code.direct]) * _gains(q, code.gain)
    first = torch.einsum('rcuv,ui,vj->rcij', units, vertical, horizontal).flatten(1)
    last = torch.cat([code.head, DIRECT * classes, -DIRECT * classes], 1)
    return sequential(
        [*layers, Layer(first.double(), None, True, {}), Layer(last.double(), None, False, {})]
    )


# ----------------------------------------------------------------------------------------------------------------------
# The theorem
# ----------------------------------------------------------------------------------------------------------------------


def binomial_inverse(errors, m, log_eta):
    """sup {p in [0, 1]: P(Bin(m, p) <= errors) >= eta}, from ln eta; the upper end of 100 bisections."""
    if not (0 <= errors <= m and m >= 1 and log_eta <= 0):
        raise BadInput(
            f'{errors} errors of {m}, ln eta = {log_eta:g}: wants 0 to m errors, and eta at most 1'
        )
    if errors == m:
        return 1.0
    k = torch.arange(errors + 1, dtype=torch.float64)
    choose = math.lgamma(m + 1) - torch.lgamma(k + 1) - torch.lgamma(m - k + 1)
    low, high = errors / m, 1.0
    for _ in range(100):
        p = (low + high) / 2
        tail = (
            -math.inf
            if p in (0, 1)
            else torch.logsumexp(choose + k * math.log(p) + (m - k) * math.log1p(-p), 0).item()
        )
        low, high = (p, high) if tail >= log_eta or p == 0 else (low, p)
    return high


def log_eta(length, delta):
    """ln of the share of delta that a message of so many bytes has: delta 256^-length, over the number of designs."""
    return math.log(delta / CHOICES) - length * math.log(256)


def prove(message, images, labels, classes, delta=0.001):
    """What a message proves of its network's true error, from the sample alone, in integers (theorem D of docs/coded.md).

    Args:
        message: bytes.
        images, labels: the whole sample, (m, C, H, W) with pixels between 0 and 1, and (m,) int64; iid.
        classes: how many there are.
    Returns:
        Proof: bound, that holds with probability at least 1 - delta for all messages at once; errors, ties among them; code.
    Raises:
        BadInput: the message is damaged, or is none about such images; or the arguments make no sense.
    """
    if not 0 < delta < 1:
        raise BadInput(f'delta = {delta!r}: must be between 0 and 1')
    code = decode(message, images.shape[1], classes)
    errors = count_errors(code, images, labels)
    return Proof(binomial_inverse(errors, len(images), log_eta(len(message), delta)), errors, code)


def count_errors(code, images, labels):
    """The number of images whose label (N,) has not the largest score alone, in integers."""
    fits = labels.shape == images.shape[:1] and labels.dtype == torch.int64
    if not (fits and 0 <= labels.min() and labels.max() < len(code.direct)):
        raise BadInput(
            f'labels of shape {tuple(labels.shape)}: must be int64, from 0 to {len(code.direct) - 1}, one an image'
        )
    outputs = scores(code, images)
    own = outputs.gather(1, labels[:, None])
    return int((outputs.scatter(1, labels[:, None], -EXACT).amax(1, keepdim=True) >= own).sum())

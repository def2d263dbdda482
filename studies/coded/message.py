"""A network as a message of a few hundred bytes, and the true error that it proves.

docs/coded.md has the format, the statement and the proof. A message decodes to a network of
integers: convolutions with ReLUs, and a classifier that reads low frequencies of the last maps,
directly and through hidden units. `decode` and `prove` compute with integers to the end.
"""

import bisect
import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F

from conf import BadInput
from measures.tails import exact_binomial_inverse
from measures.trace import Layer, sequential

# The format: how many choices there are of each field.
DEPTHS, WIDTHS, SIZES, STRIDES, PADDINGS, FREQUENCIES, GAINS, UNITS = 8, 64, 8, 4, 4, 8, 4, 64
DIRECT = 3  # factor of a score's direct part: a hidden unit is about three times a feature
LEVELS = 0, 1, 2, 3, 4, 8, 16, 32, 64, 128  # level i: magnitudes LEVELS[i] to below LEVELS[i + 1]
URN = 64, 64, 32, 16, 8, 4, 2, 1, 1  # counts of the levels before the first is drawn
DRAWN = 64  # added to the count of a level that was drawn
LONGEST = 4096  # bytes of a message
MOST_INTEGERS = 8 * LONGEST  # of a network, so that a short file cannot ask for much work
EXACT = 2**53  # scores are below it, so that float64 computes them exactly too
DESIGN_BYTES = 16  # what each message pays for the choice of this format among 2^128


class Code(NamedTuple):
    """What a message says; all tensors are int64."""

    kernels: list  # (out, in, k, k) each
    geometry: list  # (stride, padding) of each
    gain: int  # features are multiplied by the frequency to the power gain / 2
    hidden: torch.Tensor  # (H, channels, q, q), hidden units that read the features
    head: torch.Tensor  # (classes, H), how the classes read these units
    direct: torch.Tensor  # (classes, channels, q, q), how they read the features


class Proof(NamedTuple):
    """The proven error, in millionths and rounded up; the errors it was computed from."""

    bound: Fraction
    errors: int
    code: Code


# --------------------------------------------------------------------------------------------------
# The message
# --------------------------------------------------------------------------------------------------


class _Writer:
    """The interval [low, low + width) / whole of [0, 1) to which a sequence of symbols narrows."""

    def __init__(self):
        self.low, self.width, self.whole = 0, 1, 1

    def __call__(self, counts, symbol):
        """Narrows it to a symbol's share; its probability is counts[symbol] / sum(counts)."""
        self.low = self.low * sum(counts) + self.width * sum(counts[:symbol])
        self.width *= counts[symbol]
        self.whole *= sum(counts)

    def message(self):
        """The shortest string of bytes such that all numbers that begin with it are inside."""
        # The string's own interval has width 256^-length, which must not exceed this one's.
        length = max(0, self.whole.bit_length() - self.width.bit_length() - 1) // 8
        while True:
            number = -(-self.low * 256**length // self.whole)
            if (number + 1) * self.whole <= (self.low + self.width) * 256**length:
                return number.to_bytes(length, 'big')
            length += 1


class _Reader:
    """The symbols whose intervals contain all numbers that begin with a message."""

    def __init__(self, message):
        # The message's number lies at offset / width of the current interval, whose width in
        # units of the message's own interval is width / whole.
        self.offset, self.width, self.whole = int.from_bytes(message, 'big'), 256 ** len(message), 1

    def __call__(self, counts):
        """The next symbol."""
        total, below, symbol = sum(counts), 0, 0
        position = self.offset * total // self.width
        while below + counts[symbol] <= position:
            below += counts[symbol]
            symbol += 1
        self.offset = self.offset * total - self.width * below
        self.width, self.whole = self.width * counts[symbol], self.whole * total
        if self.width < self.whole:
            raise BadInput('ends before its network does')
        return symbol


def _write_tensor(coder, tensor):
    """Each integer as its level, whose counts learn from those before, its sign and the rest."""
    urn = list(URN)
    for value in tensor.flatten().tolist():
        level = bisect.bisect(LEVELS, abs(value)) - 1
        coder(urn, level)
        urn[level] += DRAWN
        if level > 0:
            low, high = LEVELS[level : level + 2]
            coder([1, 1], int(value < 0))
            coder([1] * (high - low), abs(value) - low)


def _read_tensor(reader, *shape):
    urn, values = list(URN), []
    for _ in range(math.prod(shape)):
        level = reader(urn)
        urn[level] += DRAWN
        value = 0
        if level > 0:
            low, high = LEVELS[level : level + 2]
            negative = reader([1, 1])
            value = low + reader([1] * (high - low))
            if negative:
                value = -value
        values.append(value)
    return torch.tensor(values, dtype=torch.int64).view(shape)


def write(coder, code):
    """Gives each symbol of a code to a function of (counts, symbol). `_read` has the same order."""
    coder([1] * DEPTHS, len(code.kernels))
    geometries = [1] * (SIZES * STRIDES * PADDINGS)
    for kernel, (stride, padding) in zip(code.kernels, code.geometry):
        symbol = ((kernel.shape[2] - 1) * STRIDES + stride - 1) * PADDINGS + padding
        coder(geometries, symbol)
        geometries[symbol] += len(geometries)
        coder([1] * WIDTHS, len(kernel) - 1)
        _write_tensor(coder, kernel)
    coder([1] * FREQUENCIES, code.direct.shape[2] - 1)
    coder([1] * GAINS, code.gain)
    coder([1] * UNITS, len(code.hidden))
    for tensor in (code.hidden, code.head, code.direct):
        _write_tensor(coder, tensor)


def _read(reader, channels, classes):
    """The code of a message about images of that many channels and that many classes."""
    left = MOST_INTEGERS

    def tensor(*shape):
        nonlocal left
        left -= math.prod(shape)
        if left < 0:  # refused before they are read
            raise BadInput(f'has more than {MOST_INTEGERS} integers')
        return _read_tensor(reader, *shape)

    kernels, geometry, geometries = [], [], [1] * (SIZES * STRIDES * PADDINGS)
    for _ in range(reader([1] * DEPTHS)):
        symbol = reader(geometries)
        geometries[symbol] += len(geometries)
        size = symbol // (STRIDES * PADDINGS) + 1
        geometry.append((symbol // PADDINGS % STRIDES + 1, symbol % PADDINGS))
        width = reader([1] * WIDTHS) + 1
        kernels.append(tensor(width, channels, size, size))
        channels = width
    q = reader([1] * FREQUENCIES) + 1
    gain, units = reader([1] * GAINS), reader([1] * UNITS)
    hidden, head = tensor(units, channels, q, q), tensor(classes, units)
    return Code(kernels, geometry, gain, hidden, head, tensor(classes, channels, q, q))


def encode(code):
    """The message of a code, as bytes.

    Raises:
        BadInput: it has none, since it has too many layers, too large integers, ...
    """
    for stride, padding in code.geometry:
        if not (1 <= stride <= STRIDES and 0 <= padding < PADDINGS):
            allowed = f'strides from 1 to {STRIDES}, paddings from 0 to {PADDINGS - 1}'
            raise BadInput(
                f'the network has stride {stride}, padding {padding}; possible: {allowed}'
            )
    if sum(tensor.numel() for tensor in (*code.kernels, *code[-3:])) > MOST_INTEGERS:
        raise BadInput(f'a message has at most {MOST_INTEGERS} integers')
    writer = _Writer()
    try:
        write(writer, code)
    except IndexError:
        raise BadInput('the network is too large for a message') from None
    message = writer.message()
    if len(message) > LONGEST:
        raise BadInput(f'a message has at most {LONGEST} bytes, this one {len(message)}')
    return message


def decode(message, channels, classes):
    """The code of a message about images of that many channels and that many classes.

    Raises:
        BadInput: it is not the message of a code; a code has only one.
    """
    if len(message) > LONGEST:
        raise BadInput(f'has {len(message)} bytes; a message has at most {LONGEST}')
    code = _read(_Reader(message), channels, classes)
    if encode(code) != message:
        raise BadInput('goes on after its network, or is not the shortest message of it')
    return code


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


def _cosines(n, q):
    """The first q rows of the discrete cosine transform of n points, (q, n), times 16, rounded.

    No entry is close to a half, so these are the same integers on every machine.
    """
    angles = [[math.pi * (i + 0.5) * u / n for i in range(n)] for u in range(q)]
    return torch.tensor([[round(16 * math.cos(angle)) for angle in row] for row in angles])


def _gains(q, gain):
    """Factors of the features, (q, q): 4 (1 + u + v)^(gain / 2) at (u, v), rounded down."""
    squares = [[16 * (1 + u + v) ** gain for v in range(q)] for u in range(q)]
    return torch.tensor([[math.isqrt(square) for square in row] for row in squares])


def _convolve(maps, kernel, stride, padding):
    """F.conv2d, for integers too."""
    if maps.is_floating_point():
        return F.conv2d(maps, kernel.to(maps.dtype), None, stride, padding)
    size = kernel.shape[2]
    windows = F.pad(maps, (padding,) * 4).unfold(2, size, stride).unfold(3, size, stride)
    out = maps.new_zeros(len(maps), len(kernel), *windows.shape[2:4])
    for o, i, a, b in kernel.nonzero().tolist():
        out[:, o].add_(windows[:, i, :, :, a, b], alpha=int(kernel[o, i, a, b]))
    return out


def _frequencies(maps, cosines, gain):
    """(N, channels, q, q) of maps (N, channels, h, w); cosines: the tables (q, h) and (q, w)."""
    vertical, horizontal = (table.to(maps.dtype) for table in cosines)
    sums = ((maps @ horizontal.T).mT @ vertical.T).mT
    return sums * _gains(len(vertical), gain).to(maps.dtype)


def low_frequencies(kernels, geometry, q, gain, maps):
    """(N, channels, q, q) of the last maps that the kernels make of maps (N, C, H, W)."""
    for kernel, (stride, padding) in zip(kernels, geometry):
        maps = _convolve(maps, kernel, stride, padding).relu()
    return _frequencies(maps, [_cosines(n, q) for n in maps.shape[2:]], gain)


def pixels(images):
    """The integers from 0 to 255 that a coded network sees, of images with pixels from 0 to 1."""
    if images.dim() != 4 or not len(images) or not (images.min() >= 0 and images.max() <= 1):
        shape = tuple(images.shape)
        raise BadInput(f'images of shape {shape}: must be (m, C, H, W) with pixels from 0 to 1')
    return (255 * images).round()


def largest_score(code, input_shape):
    """An upper bound of all scores on images of this shape: absolute weights on a white image.

    It is a float64. Whether it is below 2^53 is exact all the same: sums and products of integers
    of one sign are exact below 2^53, and rounding brings none of them back below it.

    Raises:
        BadInput: a kernel, or the number of frequencies, is larger than the maps.
    """
    maps = torch.full((1, *input_shape), 255.0, dtype=torch.float64)
    for kernel, (stride, padding) in zip(code.kernels, code.geometry):
        if min(maps.shape[2:]) + 2 * padding < kernel.shape[2]:
            raise BadInput(f'a kernel of size {kernel.shape[2]} is larger than its maps')
        maps = _convolve(maps, kernel.abs(), stride, padding)
    size, q = maps.shape[2:], code.direct.shape[2]
    if min(size) < q:
        raise BadInput(f'the last maps, {size[0]}x{size[1]}, do not have {q}x{q} frequencies')
    cosines = [_cosines(n, q).abs() for n in size]
    features = _frequencies(maps, cosines, code.gain).flatten()
    hidden, head, direct = (part.abs().double().flatten(1) for part in code[-3:])
    return (DIRECT * direct @ features + head @ (hidden @ features)).max().item()


@torch.no_grad()
def scores(code, images):
    """(N, C) int64: the scores of the classes on images (N, C, H, W) with pixels from 0 to 1.

    Raises:
        BadInput: the images do not fit the code, or a score could reach 2^53.
    """
    if largest_score(code, images.shape[1:]) >= EXACT:
        raise BadInput('the scores of the network could reach 2^53')
    q, hidden, direct = code.direct.shape[2], code.hidden.flatten(1), code.direct.flatten(1)
    found = []
    for part in pixels(images).split(200):
        features = low_frequencies(code.kernels, code.geometry, q, code.gain, part.long())
        features = features.flatten(1)
        units = (features @ hidden.T).relu()
        found.append(DIRECT * (features @ direct.T) + units @ code.head.T)
    return torch.cat(found)


def coded_network(code, input_shape):
    """The network of a code as an nn.Sequential in float64, for inputs round(255 x).

    Its outputs are the same integers. The direct part of the scores passes the last ReLU in two
    halves, as direct = relu(direct) - relu(-direct).
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
    layers.append(Layer(first.double(), None, True, {}))
    return sequential([*layers, Layer(last.double(), None, False, {})])


# --------------------------------------------------------------------------------------------------
# The theorem
# --------------------------------------------------------------------------------------------------


def share(length, delta):
    """A message's share of delta, a Fraction: delta 256^-(length + DESIGN_BYTES).

    delta is read from its decimal digits: the float 0.001 is not 1/1000, and '0.001' is meant.
    """
    return Fraction(str(delta)) / 256 ** (length + DESIGN_BYTES)


def prove(message, images, labels, classes, delta=0.001):
    """What a message proves of its network's true error, from the sample and in integers.

    Theorem D of docs/coded.md.

    Args:
        message: bytes.
        images, labels: the whole i.i.d. sample, (m, C, H, W) with pixels from 0 to 1, and (m,).
        classes: how many there are.
        delta: a number, or its decimal string.
    Returns:
        Proof; its bound holds with probability at least 1 - delta for all messages at once.
    Raises:
        BadInput: the message is damaged or not about such images, or the arguments make no sense.
    """
    if not 0 < float(delta) < 1:
        raise BadInput(f'delta = {delta!r}: must be between 0 and 1')
    code = decode(message, images.shape[1], classes)
    errors = count_errors(code, images, labels)
    bound = exact_binomial_inverse(errors, len(images), share(len(message), delta))
    return Proof(bound, errors, code)


def count_errors(code, images, labels):
    """The number of images whose label (N,) does not have the strictly largest score."""
    fits = labels.shape == images.shape[:1] and len(labels) > 0 and not labels.is_floating_point()
    whole = labels.long()
    if not (fits and 0 <= whole.min() and whole.max() < len(code.direct)):
        shape, last = tuple(labels.shape), len(code.direct) - 1
        raise BadInput(f'labels of shape {shape}: must be integers from 0 to {last}, one an image')
    return int((~is_largest(scores(code, images), whole)).sum())


def is_largest(outputs, labels):
    """Whether each label (N,) has the strictly largest of the integer outputs (N, C)."""
    labels = labels.long()[:, None]
    others = outputs.scatter(1, labels, -EXACT).amax(1, keepdim=True)
    return (outputs.gather(1, labels) > others)[:, 0]

"""Proves the error of a message on MNIST's training set, with probability 0.999.

python studies/coded/check.py coded.bin [--data-dir DIR]

A second program, written from docs/coded.md alone, with numpy and the standard library alone.
The digest is the sha256 of all pixels, then all labels, a byte each.
"""

import argparse
import gzip
import hashlib
import math
import os
from pathlib import Path

import numpy as np


def demand(holds, words):
    if not holds:
        raise ValueError(words)


def decode(message, channels, classes):
    """[[kernel, stride, padding], ...], gain and the tensors a, b, w of a message."""
    unit, number, room = 256 ** len(message), int.from_bytes(message, 'big'), 32768
    low, width, whole = 0, 1, 1  # the interval [low, low + width) / whole

    def symbol(counts):
        nonlocal low, width, whole
        position, i = (number * whole - low * unit) * sum(counts) // (width * unit), 0
        while sum(counts[: i + 1]) <= position:
            i += 1
        low, whole = low * sum(counts) + width * sum(counts[:i]), whole * sum(counts)
        width *= counts[i]
        demand(width * unit >= whole, 'the message ends before its network does')
        return i

    def tensor(*shape):
        nonlocal room
        room -= math.prod(shape)
        demand(room >= 0, 'more than 32768 integers')
        urn, values = [64, 64, 32, 16, 8, 4, 2, 1, 1], []
        for _ in range(math.prod(shape)):
            level = symbol(urn)
            urn[level] += 64
            sign = 1 - 2 * symbol([1, 1]) if level else 0
            first, size = (level, 1) if level < 4 else (2 ** (level - 2), 2 ** (level - 2))
            values.append(sign * (first + symbol([1] * size)))
        return np.array(values, dtype=np.int64).reshape(shape)

    layers, geometries = [], [1] * 128
    for _ in range(symbol([1] * 8)):
        geometry = symbol(geometries)
        geometries[geometry] += 128
        shape = symbol([1] * 64) + 1, channels, geometry // 16 + 1, geometry // 16 + 1
        layers.append([tensor(*shape), geometry // 4 % 4 + 1, geometry % 4])
        channels = shape[0]
    q, gain, units = symbol([1] * 8) + 1, symbol([1] * 4), symbol([1] * 64)
    a, b, w = tensor(units, channels, q, q), tensor(classes, units), tensor(classes, channels, q, q)
    for length in range(4097):  # the shortest message of the interval, of these the least
        least = -(-low * 256**length // whole)
        if (least + 1) * whole <= (low + width) * 256**length:
            break
    demand(message == least.to_bytes(length, 'big'), 'not the message of its network')
    return layers, gain, a, b, w


def scores(layers, gain, a, b, w, z):
    """(N, classes) for z (N, channels, height, width); float64 z: of the tables without signs."""
    for kernel, stride, padding in layers:
        z = np.pad(z, [(0, 0), (0, 0), (padding,) * 2, (padding,) * 2])
        taps = np.lib.stride_tricks.sliding_window_view(z, kernel.shape[2:], (2, 3))
        taps = taps[:, :, ::stride, ::stride]
        z = np.zeros((len(taps), len(kernel), *taps.shape[2:4]), taps.dtype)
        for o, i, y, x in np.argwhere(kernel):
            z[:, o] += kernel[o, i, y, x] * taps[:, i, :, :, y, x]
        z = z.clip(0)
    u, tables = np.arange(w.shape[2]), []
    demand(len(u) <= min(z.shape[2:]), 'fewer rows or columns than frequencies')
    for n in z.shape[2:]:
        table = np.rint(16 * np.cos(np.pi * (np.arange(n) + 0.5) * u[:, None] / n))
        tables.append(abs(table) if z.dtype == float else table.astype(np.int64))
    factors = np.sqrt(16 * (1 + np.add.outer(u, u)) ** gain).astype(np.int64)
    features = (tables[0] @ z @ tables[1].T * factors).reshape(len(z), -1)
    units = np.maximum(features @ a.reshape(len(a), features.shape[1]).T, 0)
    return 3 * (features @ w.reshape(len(w), -1).T) + units @ b.T


def count_errors(network, pixels, labels):
    """The images (m, channels, height, width) whose label has not the only largest score."""
    layers, gain, *parts = network
    sizes = [[abs(kernel), *geometry] for kernel, *geometry in layers], gain, *map(abs, parts)
    # Sums of integers of one sign are exact in float64 up to 2^53, and do not fall back below it.
    white = scores(*sizes, np.full((1, *pixels.shape[1:]), 255.0))
    demand(white.max() < 2**53, 'scores could reach 2^53')
    errors = 0
    for start in range(0, len(labels), 500):
        found = scores(*network, pixels[start : start + 500].astype(np.int64))
        own = np.eye(found.shape[1], dtype=bool)[labels[start : start + 500]]
        errors += int((np.where(own, -(2**60), found).max(1) >= found[own]).sum())
    return errors


def prove(errors, m, length, delta=(1, 1000)):
    """The bound of the true error, in millionths; delta is a fraction."""
    low, high = 0, 10**6
    while errors < m and high - low > 1:
        a, b = (low + high) // 2, 10**6 - (low + high) // 2
        term = total = b**errors  # of the sum over j of C(m, j) a^j b^(errors - j)
        for j in range(errors):
            term = term * (m - j) * a // ((j + 1) * b)
            total += term
        left = delta[1] * 256 ** (length + 16) * total * b ** (m - errors)
        low, high = (low, a) if left < delta[0] * 10 ** (6 * m) else (a, high)
    return high


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('message', type=Path, help='a coded.bin')
    default = os.environ.get('DATA_DIR', 'data')
    parser.add_argument('--data-dir', default=default, help='the folder that holds MNIST/')
    options, data = parser.parse_args(), []
    for name, header in ('images-idx3', 16), ('labels-idx1', 8):
        files = sorted(Path(options.data_dir, 'MNIST').rglob(f'train-{name}-ubyte*'))
        demand(files, f'{options.data_dir}: has no MNIST/**/train-{name}-ubyte; give --data-dir')
        path = files[0]
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            data.append(file.read()[header:])
    pixels, labels = (np.frombuffer(part, np.uint8) for part in data)
    message, m = options.message.read_bytes(), len(labels)
    errors = count_errors(decode(message, 1, 10), pixels.reshape(m, 1, 28, 28), labels)
    bound = -(-prove(errors, m, len(message)) // 100) / 10**4
    digest = hashlib.sha256(b''.join(data)).hexdigest()
    print(f'{len(message)} bytes, {errors} errors of {m}, proven error {bound:.4f}; MNIST {digest}')


if __name__ == '__main__':
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f'check.py: {error}') from None

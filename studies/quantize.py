"""Quantized and pruned networks against the path-metric: how far outputs move, which classes provably stay.

    OMP_NUM_THREADS=1 python docs/quantize.py                     in minutes
    OMP_NUM_THREADS=1 python docs/quantize.py results/7/CONV-3-200 --images 500

prints a row per level and writes quantize.csv and quantize.png: into docs/ without arguments, into the current
directory as my_quantize.csv and my_quantize.png with any. The theorem is in docs/bounds.md.
"""

import argparse
import sys
from pathlib import Path

import torch
from launch import get_inputs

from conf import ROOT, BadInput
from measures.paths import path_metric, path_norm
from measures.steps import forward_steps
from measures.trace import plain_copy
from records import load_network
from summary import csv_file


def fixed_point(tensor, bits, rounding):
    """Multiples of one step per tensor, of which 2^(bits - 1) - 1 reach its largest entry."""
    step = tensor.abs().max() / (2 ** (bits - 1) - 1)
    return rounding(tensor / step) * step if step else tensor


def mantissa(tensor, bits, rounding):
    """Floating-point numbers of so many significant bits."""
    fraction, exponent = torch.frexp(tensor)
    return torch.ldexp(rounding(torch.ldexp(fraction, torch.tensor(bits))), exponent - bits)


def pruned(tensor, percent, _=None):
    """The so many percent of the entries of least absolute value become 0."""
    flat = tensor.flatten().clone()
    flat[flat.abs().argsort()[: round(percent / 100 * len(flat))]] = 0
    return flat.view_as(tensor)


BITS = (4, 8, 10, 12, 14, 16, 20)
NEAREST, TO_ZERO = torch.round, torch.trunc
CHANGES = {
    'fixed point, to nearest': (fixed_point, BITS, NEAREST),
    'fixed point, to zero': (fixed_point, BITS, TO_ZERO),
    'significant bits, to nearest': (mantissa, BITS, NEAREST),
    'significant bits, to zero': (mantissa, BITS, TO_ZERO),
    'magnitude pruning': (pruned, (20, 25, 30, 40, 60, 80), None),
}


@torch.no_grad()
def changed(net, change, level, rounding):
    """A copy of a network, its weights plain ones and each tensor of them changed on its own."""
    net = plain_copy(net)
    for parameter in net.parameters():
        parameter.copy_(change(parameter, level, rounding))
    return net


def outputs(net, images):
    return torch.cat([net(part) for part in images.split(100)])


def share(cases):
    return cases.double().mean().item()


@torch.no_grad()
def measure(net, images, labels, changes=CHANGES):
    """How far a network moves under each change, by the path-metric and on images, in float64.

    Yields:
        (change, level, row), where row is a dict of
            metric        the path-metric, the sum of d_v over the outputs v
            pair          the two largest d_v, added up
            worst         the largest l1 distance of the outputs over the size of the image: its largest entry, or
                          1 if that is smaller and there are biases
            error         of the network after the change
            changed       share of images whose class changes
            stays         share whose class cannot change by the theorem: its output is ahead of each other one by
                          more than the size of the image times the sum of the two d
            stays_by_sum  the same with the metric in the place of that sum
    """
    net, images = plain_copy(net).double().eval(), images.double()
    sizes = images.flatten(1).abs().amax(1)
    if any(
        step.bias is not None for step in forward_steps(net)
    ):  # batch normalization has them without parameters too
        sizes = sizes.clamp(min=1)
    before = outputs(net, images)
    top = before.argmax(1)
    ahead = (before.gather(1, top[:, None]) - before) / sizes[:, None]
    ahead.scatter_(1, top[:, None], torch.inf)  # nothing is to be ahead of itself
    for words, (change, levels, rounding) in changes.items():
        for level in levels:
            other = changed(net, change, level, rounding)
            after = outputs(other, images)
            each, _ = path_metric(net, other, images.shape[1:], outputs=True)
            row = {
                'metric': each.sum().item(),
                'pair': each.topk(2)[0].sum().item(),
                'worst': ((after - before).abs().sum(1) / sizes).max().item(),
                'error': share(after.argmax(1) != labels),
                'changed': share(after.argmax(1) != top),
                'stays': share((ahead > each[top][:, None] + each).all(1)),
                'stays_by_sum': share((ahead > each.sum()).all(1)),
            }
            yield words, level, row


def draw(table, norm, path):
    """Above the metric and the worst change, below whose class stays; a column for each kind of change."""
    import matplotlib.figure

    kinds = [*dict.fromkeys(words.partition(', ')[0] for words in table)]
    figure = matplotlib.figure.Figure(figsize=(12, 6), layout='constrained')
    panels = figure.subplots(2, len(kinds), sharey='row', sharex='col')
    for words, rows in table.items():
        kind, _, rounding = words.partition(', ')
        column = panels[:, kinds.index(kind)]
        style, levels = '--' if rounding == 'to zero' else '-', list(rows)
        for panel, name, label, color in (
            (column[0], 'metric', 'path-metric', 'C3'),
            (column[0], 'worst', 'largest change found', 'C0'),
            (column[1], 'stays', 'class stays, proven', 'C3'),
            (column[1], 'kept', 'class stays', 'C0'),
        ):
            values = [1 - row['changed'] if name == 'kept' else row[name] for row in rows.values()]
            panel.plot(
                levels,
                values,
                style,
                marker='.',
                color=color,
                label=f'{label}, {rounding}' if rounding else label,
            )
        column[0].set(title=kind, yscale='log')
        column[0].axhline(norm, color='black', linewidth=0.8, linestyle=':')
        column[1].set(xlabel='bits' if rounding else 'percent of each layer', ylim=(-0.03, 1.03))
    panels[0, 0].set_ylabel('change of the outputs (l1)\nper unit of the largest pixel')
    panels[1, 0].set_ylabel('share of test images')
    for row, place in zip(panels, ('upper', 'lower')):
        figure.legend(
            *row[0].get_legend_handles_labels(), loc=f'outside right {place}', frameon=False
        )
    figure.savefig(path, dpi=110)


def main(run, images, path):
    """Prints the rows of a run's network on so many test images, and writes them and their picture beside `path`."""
    if images < 1:
        raise BadInput(f'--images {images}: must be at least 1')
    net, settings = load_network(run)
    _, dataset = get_inputs(settings)
    table, lines = {}, []
    for words, level, row in measure(
        net, dataset.test_images[:images], dataset.test_labels[:images]
    ):
        if not table:
            print('', 'change', 'level', *row, '', sep=' | ')
        print(
            '', words, level, *(f'{value:.3g}' for value in row.values()), '', sep=' | ', flush=True
        )
        table.setdefault(words, {})[level] = row
        lines.append({'change': words, 'level': level} | row)
    path.with_suffix('.csv').write_bytes(csv_file(lines))
    draw(table, path_norm(net, dataset.input_shape), path.with_suffix('.png'))


if __name__ == '__main__':
    shipped = ROOT / 'docs' / 'quantize' if len(sys.argv) == 1 else Path('my_quantize')
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    run = ROOT / 'results' / 'mnist-width' / 'CONV-3-16'
    parser.add_argument(
        'run',
        type=Path,
        nargs='?',
        default=run,
        help='folder of a trained network (CONV-3-16 on MNIST)',
    )
    parser.add_argument('--images', type=int, default=2000, help='so many first test images (2000)')
    try:
        main(**vars(parser.parse_args()), path=shipped)
    except (BadInput, OSError) as error:
        sys.exit(f'error: {error}')

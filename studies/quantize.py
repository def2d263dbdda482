"""Quantized and pruned networks against the path-metric (docs/bounds.md has the theorem).

    python -m studies.quantize                               CONV-3-16 of results/mnist-width
    python -m studies.quantize results/7/CONV-3-200 --images 500 [--out DIR]

prints, for each kind and level of change, how far the outputs move and for which share of the test
images the class provably stays. This takes minutes.
"""

import sys
from pathlib import Path

import torch

from conf import ROOT, BadInput, run_program
from measures.paths import path_metric, path_norm
from measures.steps import forward_steps
from measures.trace import outputs, plain_copy
from records import load_data, load_network, write_table
from studies.report import new_figure, save, study_parser

SHIPPED = ROOT / 'results' / 'mnist-width' / 'CONV-3-16'


def fixed_point(tensor, bits, rounding):
    """Multiples of one step per tensor, of which 2^(bits - 1) - 1 reach its largest entry."""
    step = tensor.abs().max() / (2 ** (bits - 1) - 1)
    return rounding(tensor / step) * step if step else tensor


def mantissa(tensor, bits, rounding):
    """Floating-point numbers with this number of significant bits."""
    fraction, exponent = torch.frexp(tensor)
    return torch.ldexp(rounding(torch.ldexp(fraction, torch.tensor(bits))), exponent - bits)


def pruned(tensor, percent, _=None):
    """The tensor with this percentage of its entries, the least in absolute value, set to 0."""
    flat = tensor.flatten().clone()
    flat[flat.abs().argsort()[: round(percent / 100 * len(flat))]] = 0
    return flat.view_as(tensor)


BITS = 4, 8, 10, 12, 14, 16, 20
CHANGES = {
    'fixed point, to nearest': (fixed_point, BITS, torch.round),
    'fixed point, to zero': (fixed_point, BITS, torch.trunc),
    'significant bits, to nearest': (mantissa, BITS, torch.round),
    'significant bits, to zero': (mantissa, BITS, torch.trunc),
    'magnitude pruning': (pruned, (20, 25, 30, 40, 60, 80), None),
}


def share(cases):
    return cases.double().mean().item()


@torch.no_grad()
def measure(net, images, labels):
    """How far a network moves under each of CHANGES, by the path-metric and on images, in float64.

    Args:
        net: a network that the path-metric covers.
        images: (n, ...), as the network sees them.
        labels: (n,) classes.
    Yields:
        for each level a dict of
            change, level
            metric        path-metric, the sum of d_v over the outputs v
            pair          sum of the two largest d_v
            worst         largest l1 distance of the outputs over the size of the image: its largest
                          absolute entry, and at least 1 if the network has biases
            error         of the changed network
            changed       share of images whose class changes
            stays         share whose class cannot change by the theorem: its output exceeds each
                          other one by more than the size of the image times the sum of the two d
            stays_by_sum  the same with the metric in place of that sum
    """
    net, images = plain_copy(net).double().eval(), images.double()
    sizes = images.flatten(1).abs().amax(1)
    # Of the steps, since batch normalization has biases even without parameters.
    if any(step.bias is not None for step in forward_steps(net)):
        sizes = sizes.clamp(min=1)
    before = outputs(net, images)
    top = before.argmax(1)
    lead = (before.gather(1, top[:, None]) - before) / sizes[:, None]
    lead.scatter_(1, top[:, None], torch.inf)  # the class need not exceed itself
    for name, (change, levels, rounding) in CHANGES.items():
        for level in levels:
            other = plain_copy(net)
            for parameter in other.parameters():
                parameter.copy_(change(parameter, level, rounding))
            after = outputs(other, images)
            each, _ = path_metric(net, other, images.shape[1:], outputs=True)
            row = {
                'change': name,
                'level': level,
                'metric': each.sum().item(),
                'pair': each.topk(2)[0].sum().item(),
                'worst': ((after - before).abs().sum(1) / sizes).max().item(),
                'error': share(after.argmax(1) != labels),
                'changed': share(after.argmax(1) != top),
                'stays': share((lead > each[top][:, None] + each).all(1)),
                'stays_by_sum': share((lead > each.sum()).all(1)),
            }
            yield row


def draw(rows, norm):
    """The metric and the largest change above, the share of classes that stay below."""
    kinds = list(dict.fromkeys(name.partition(', ')[0] for name in CHANGES))
    figure = new_figure(8.5, 6.5)
    panels = figure.subplots(2, len(kinds), sharey='row', sharex='col')
    for name in CHANGES:
        kind, _, rounding = name.partition(', ')
        upper, lower = panels[:, kinds.index(kind)]
        group = [row for row in rows if row['change'] == name]
        levels = [row['level'] for row in group]
        kept = [1 - row['changed'] for row in group]
        line = '--' if rounding == 'to zero' else '-'
        for panel, color, label, values in (
            (upper, 'C3', 'path-metric', [row['metric'] for row in group]),
            (upper, 'C0', 'largest change found', [row['worst'] for row in group]),
            (lower, 'C3', 'class stays, proven', [row['stays'] for row in group]),
            (lower, 'C0', 'class stays', kept),
        ):
            label = f'{label}, {rounding}'.removesuffix(', ')
            panel.plot(levels, values, line, marker='.', color=color, label=label)
        upper.set(title=kind, yscale='log')
        upper.axhline(norm, color='black', linewidth=0.8, linestyle=':')
        unit = 'bits' if rounding else 'percent of each layer'
        lower.set(xlabel=unit, ylim=(-0.03, 1.03))
    panels[0, 0].set_ylabel('change of the outputs (l1)\nper unit of the largest pixel')
    panels[1, 0].set_ylabel('share of test images')
    handles = {}
    for panel in panels.flat:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines))
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3, frameon=False)
    return figure


def main(arguments=None):
    parser = study_parser('quantize', __doc__, 'quantize.csv and quantize.png')
    parser.add_argument(
        'run', type=Path, nargs='?', default=SHIPPED, help='folder of a trained network'
    )
    parser.add_argument(
        '--images', type=int, default=2000, help='number of test images, the first ones (2000)'
    )
    options = parser.parse_args(arguments)
    if options.images < 1:
        raise BadInput(f'--images {options.images}: must be at least 1')
    net, settings = load_network(options.run)
    dataset, rows = load_data(settings, 'cpu'), []
    images = dataset.test_images[: options.images]
    for row in measure(net, images, dataset.test_labels[: options.images]):
        if not rows:
            print('|', ' | '.join(row), '|')
            print('|' + ' --- |' * len(row))
        change, level, *values = row.values()
        cells = [change, str(level), *(f'{value:.3g}' for value in values)]
        print('|', ' | '.join(cells), '|', flush=True)
        rows.append(row)
    if options.out:
        save(draw(rows, path_norm(net, dataset.input_shape)), options.out / 'quantize.png', 110)
        write_table(options.out / 'quantize.csv', list(rows[0]), rows)


if __name__ == '__main__':
    sys.exit(run_program(main))

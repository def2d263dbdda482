"""What the certificates of trained networks are made of, and what each part of the prior buys.

OMP_NUM_THREADS=1 python -m studies.certificate_parts results/mnist-width results/sparse-certificate
    prints the parts of certificate A of each network of these folders, then, for the first one, A
    with one part of the prior changed at a time (docs/certificate.md). It takes minutes.
"""

import math
import sys
from pathlib import Path

import torch

from conf import BadInput, load_launch, run_program
from device import keep_freed_memory
from evaluation import no_certificate, rounded_up
from measures.pac_bayes import COLUMNS, PRIOR, certificates
from records import load_data, load_network
from studies.report import study_parser

ZERO, ONE = torch.zeros(1).double(), torch.ones(1).double()
CHANGES = {
    'as it is': {},
    'prior of the classifier at zero, τ = 0': {'sizes': ZERO},
    'prior covariance I, β₀ = 0': {'betas': ZERO},
    'both': {'sizes': ZERO, 'betas': ZERO},
    'one Gaussian instead of two for the hidden kernels': {'shares': ONE},
    'R = 128 instead of 512': {'rank': 128},
    'n0 = 1000 instead of 2000': {'images': 1000},
    'n0 = 4000 instead of 2000': {'images': 4000},
}


def certificates_of(net, settings, prior=PRIOR):
    dataset = load_data(settings)
    images, labels = dataset.train_images, dataset.train_labels
    return certificates(net.to(images.device), images, labels, settings.delta, prior)


def show(*cells):
    print('', *cells, '', sep=' | ', flush=True)


def show_parts(net, settings):
    """A row of the page's table: A, its parts, and the hidden weights that A and B send."""
    found = certificates_of(net, settings)
    a, b = found[COLUMNS[0]], found[COLUMNS[1]]
    if a.bound == 1:
        show(settings.name, 'nothing is certified')
        return
    nats = [f'{part:.4f}' for part in (a.loss, a.hidden, a.classifier)]
    grids = f'{a.c:.1f}', f'2^{math.log2(a.beta):.0f}', f'{a.gamma:g}', f'{a.slack:.3f}'
    bits = ', '.join(map(str, a.bits))
    show(settings.name, f'{rounded_up(a.bound):.4f}', *nats, *grids, bits, a.sent, b.sent)


def main(argv=None):
    parser = study_parser('certificate_parts', __doc__)
    parser.add_argument('folders', type=Path, nargs='+', help='results folders with weights')
    keep_freed_memory()
    networks = []
    for folder in parser.parse_args(argv).folders:
        networks += [load_network(folder / run.name) for run in load_launch(folder)[1]]
    for net, settings in networks:
        if reason := no_certificate(settings):
            raise BadInput(f'{settings.name}: has no certificate, {reason}')
        show_parts(net, settings)
    net, settings = networks[0]
    for words, change in CHANGES.items():
        bound = certificates_of(net, settings, PRIOR._replace(**change))[COLUMNS[0]].bound
        show(words, f'{rounded_up(bound):.4f}')


if __name__ == '__main__':
    sys.exit(run_program(main))

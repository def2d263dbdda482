"""What the certificates of trained networks are made of, and what each part of the prior buys (docs/certificate.md).

    OMP_NUM_THREADS=1 python docs/certificate_parts.py results/mnist-width results/sparse-certificate

prints the parts of certificate A of every network of these folders that is trained on MNIST; then, for the first, A with one
part changed at a time. Minutes.
"""

import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from launch import get_inputs
from machine import keep_freed_memory
from measures import pac_bayes
from records import folder_settings, load_network, rounded_up

CHANGES = {
    'as it is': {'RANK': pac_bayes.RANK},
    'prior of the classifier at zero, τ = 0': {'SIZES': torch.zeros(1).double()},
    'prior covariance I, β₀ = 0': {'PRIOR_BETAS': torch.zeros(1).double()},
    'both': {'SIZES': torch.zeros(1).double(), 'PRIOR_BETAS': torch.zeros(1).double()},
    'one Gaussian instead of two for the hidden kernels': {'SHARES': torch.ones(1).double()},
    'R = 128 instead of 512': {'RANK': 128},
    'n0 = 1000 instead of 2000': {'PRIOR_IMAGES': 1000},
    'n0 = 4000 instead of 2000': {'PRIOR_IMAGES': 4000},
}


def certificate(net, dataset, delta):
    """A, the CPU seconds that it took, and the arguments of its last bound and of the code of its hidden layers."""
    start = time.process_time()
    with (
        mock.patch.object(pac_bayes, '_rounded', return_value=(1.0, 1.0)),  # B and C are not asked for
        mock.patch.object(pac_bayes, '_best', wraps=pac_bayes._best) as best,
        mock.patch.object(pac_bayes, '_nats', wraps=pac_bayes._nats) as code,
    ):
        bound = pac_bayes.certify(net, dataset.train_images, dataset.train_labels, delta)['pac_bayes_error']
    return bound, time.process_time() - start, best.call_args and best.call_args.args, code.call_args and code.call_args.args


def parts(table, m1, nats, gap, point):
    """A row of the page's first table, but for its name and the bits."""
    _, (octaves, beta, gamma) = pac_bayes._best(table, m1, nats, gap, point)
    c = 2 ** (octaves / 8)
    theta = next(theta for theta in pac_bayes.THETAS if theta >= c * gap)
    noisy = pac_bayes.noisy_errors(c * table.margins - theta * table.x[:, None], table.v[:, beta], pac_bayes.GAMMAS[gamma])
    shares = [f'{value:.4f}' for value in (noisy.mean().item(), nats / m1, table.kl(c, beta) / m1)]
    grids = f'{c:.1f}', f'2^{pac_bayes.BETAS[beta].log2():.0f}', f'{pac_bayes.GAMMAS[gamma]:g}'
    return [*shares, *grids, f'{theta * table.x.mean().item():.3f}']


def main(folders):
    keep_freed_memory()
    nets = [load_network(Path(folder, run.name)) for folder in folders for run in folder_settings(folder)[1]]
    for net, settings in nets:
        bound, _, last, code = certificate(net, get_inputs(settings)[1], settings.delta)
        cells = [*parts(*last), ', '.join(map(str, code[1]))] if last else ['nothing is certified']
        print('', settings.name, f'{rounded_up(bound):.4f}', *cells, '', sep=' | ', flush=True)
    net, settings = nets[0]
    for words, change in CHANGES.items():
        with mock.patch.multiple(pac_bayes, **change):
            bound, seconds, *_ = certificate(net, get_inputs(settings)[1], settings.delta)
        print('', words, f'{rounded_up(bound):.4f}', f'{seconds:.0f}', '', sep=' | ', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])

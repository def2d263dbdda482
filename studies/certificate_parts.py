"""What the certificates of trained networks are made of, and what each part of the prior buys (docs/certificate.md).

    OMP_NUM_THREADS=1 python docs/certificate_parts.py results/mnist-width results/sparse-certificate

prints the parts of certificate A of every network of these folders; then, for the first, A with one part changed at a time.
Minutes.
"""

import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from launch import get_inputs

from conf import BadInput
from device import keep_freed_memory
from evaluation import no_certificate, rounded_up
from measures import pac_bayes
from records import folder_settings, load_network

CHANGES = {
    'as it is': {},
    'prior of the classifier at zero, τ = 0': {'SIZES': torch.zeros(1).double()},
    'prior covariance I, β₀ = 0': {'PRIOR_BETAS': torch.zeros(1).double()},
    'both': {'SIZES': torch.zeros(1).double(), 'PRIOR_BETAS': torch.zeros(1).double()},
    'one Gaussian instead of two for the hidden kernels': {'SHARES': torch.ones(1).double()},
    'R = 128 instead of 512': {'RANK': 128},
    'n0 = 1000 instead of 2000': {'PRIOR_IMAGES': 1000},
    'n0 = 4000 instead of 2000': {'PRIOR_IMAGES': 4000},
}


def certificates(net, settings):
    """The three certificates, with the arguments of every bound `_least_bound` and of every code `_nats` on the way."""
    device, dataset = get_inputs(settings)
    least = mock.patch.object(pac_bayes, '_least_bound', wraps=pac_bayes._least_bound)
    code = mock.patch.object(pac_bayes, '_nats', wraps=pac_bayes._nats)
    with least as least, code as code:
        found = pac_bayes.certify(
            net.to(device), dataset.train_images, dataset.train_labels, settings.delta
        )
    return (
        found,
        [call.args for call in least.call_args_list],
        [call.args for call in code.call_args_list],
    )


def parts(problem, point):
    """What a bound is made of: mean of p, nats per image of hidden layers and of the classifier, c, beta, gamma, theta |x|."""
    _, (octaves, beta, gamma) = pac_bayes._least_bound(problem, point)
    c, log_beta, gamma = (
        2 ** (octaves / 8),
        pac_bayes.BETAS[beta].log2().item(),
        pac_bayes.GAMMAS[gamma],
    )
    theta = next(theta for theta in pac_bayes.THETAS if theta >= c * problem.gap)
    noisy = pac_bayes.noisy_errors(
        c * problem.margins - theta * problem.x[:, None], problem.v[:, beta], gamma
    )
    nats, m1 = problem.nats, problem.m1
    shares = [
        f'{value:.4f}' for value in (noisy.mean().item(), nats / m1, problem.kl(c, beta) / m1)
    ]
    return [
        *shares,
        f'{c:.1f}',
        f'2^{log_beta:.0f}',
        f'{gamma:g}',
        f'{theta * problem.x.mean().item():.3f}',
    ]


def sent(kernels, bits):
    """How many hidden weights are not 0."""
    return str(sum(int(kernel.count_nonzero()) for kernel in kernels[:-1]))


def main(folders):
    keep_freed_memory()
    nets = [
        load_network(folder / run.name) for folder in folders for run in folder_settings(folder)[1]
    ]
    for net, settings in nets:
        if reason := no_certificate(settings):
            raise BadInput(f'{settings.name}: has no certificate, {reason}')
        found, bounds, codes = certificates(net, settings)
        if found['pac_bayes_error'] == 1:
            print(f'{settings.name}: nothing is certified')
            continue
        bits = ', '.join(map(str, codes[0][1]))
        cells = [
            f'{rounded_up(found["pac_bayes_error"]):.4f}',
            *parts(*bounds[0]),
            bits,
            sent(*codes[0]),
            sent(*codes[-1]),
        ]
        print('', settings.name, *cells, '', sep=' | ', flush=True)
    net, settings = nets[0]
    for words, change in CHANGES.items():
        start = time.process_time()
        with mock.patch.multiple(
            pac_bayes, _rounded=lambda *problem: (1.0, 1.0), **change
        ):  # B and C are not asked for
            found, *_ = certificates(net, settings)
        seconds = time.process_time() - start
        print(
            '',
            words,
            f'{rounded_up(found["pac_bayes_error"]):.4f}',
            f'{seconds:.0f}',
            '',
            sep=' | ',
            flush=True,
        )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        'folders', type=Path, nargs='+', help='results folders with the weights of their networks'
    )
    try:
        main(**vars(parser.parse_args()))
    except (BadInput, OSError) as error:
        sys.exit(f'error: {error}')

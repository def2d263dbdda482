"""The bounds: a formula each, in float64, over the tables that `measures.norms` measures once."""

import copy
import warnings

import numpy as np
import torch

from conf import BadInput
from measures.norms import (
    Table,
    classification_margins,
    log_product,
    margin_error,
    measure_data,
    measure_network,
    product,
)
from measures.steps import NotCovered
from measures.trace import outputs

# --------------------------------------------------------------------------------------------------
# Formulas of bounds on err_P(f) - err_S^gamma(f). Each is a function of the two tables, delta and
# gamma. The words before the first colon of its docstring name it in the figure; where it is logged
# and plotted follows from its entry in BOUNDS.
# --------------------------------------------------------------------------------------------------


def tail(norm, m, delta):
    """The confidence term after a union over integer values of the norm."""
    return 3 * np.sqrt((np.log(2 / delta) + 2 * np.log(norm + 2)) / (2 * m))


def our_bound(network, data, delta, gamma):
    """Ours (Galanti et al. 2023): main theorem of "Norm-based Generalization Bounds for Sparse
    Neural Networks" (NeurIPS 2023).

    As the paper's Figure 1 evaluates it; rho is the product of the Frobenius norms of the weight
    tensors.
    """
    log_paths = network.D * np.log(2) + np.log(network.deg[:-1]).sum() + np.log(network.c[-1])
    energy = np.sqrt(product(network.deg[:-1], data.E_max))
    complexity = (1 + np.sqrt(2 * log_paths)) * energy / data.m
    return product(2 * np.sqrt(2) * (network.rho + 1) / gamma, complexity) + tail(
        network.rho, data.m, delta
    )


def golowich_bound(network, data, delta, gamma):
    """Golowich et al. 2018: Theorem 1 of "Size-Independent Sample Complexity of Neural Networks"
    (COLT 2018).

    Applied to the layers' Toeplitz matrices, and carried to C classes and margins in the way of
    `our_bound`.
    """
    rho = product(network.T)
    log_paths = network.D * np.log(2) + np.log(network.c[-1])
    complexity = (1 + np.sqrt(2 * log_paths)) * np.sqrt(data.E_tot) / data.m
    return product(2 * np.sqrt(2) * (rho + 1) / gamma, complexity) + tail(rho, data.m, delta)


def ledent_bound(network, data, delta, gamma):
    """Ledent et al. 2021: Section E of "Norm-based Generalisation Bounds for Deep Multi-class CNNs"
    (AAAI 2021).

    The form with fixed Lipschitz constraints, as Graf et al. 2022 evaluate it, distances taken from
    zero. The theorem's largest patch norm of a layer's input is bounded by that of the patch's
    receptive field times the operator norms before it. No union over norms.
    """
    D, m = network.D, data.m
    q = [
        product(
            data.P[l] / gamma,
            np.delete(network.s[:-1], l),
            network.r,
            network.a[l],
            np.sqrt(network.p[l]),
        )
        for l in range(D - 1)
    ]
    q = np.array([*q, product(data.P[-1] / gamma, network.s[:-1], network.F[-1])])
    units = network.p * network.c
    Q = (q ** (2 / 3)).sum() ** (3 / 2)
    Gamma, Wbar = (q * units).max(), units.max()
    R = 4 / m + product(
        768 * Q / np.sqrt(m), np.sqrt(np.log2(32 * Gamma * m**2 + 7 * Wbar * m)), np.log(m)
    )
    return 2 * R + 3 * np.sqrt(np.log(2 / delta) / (2 * m))


def _graf_logs(network, data, gamma):
    """log C_l of Theorem 3.5 of Graf et al. 2022, distances from zero; C_l = (4 / gamma) sqrt(E_tot
    / m) lip b_l / s_l.

    A linear layer is a convolution with a 1x1 kernel at one position, as they say, so that it
    enters with R_l for b_l.
    """
    energy = np.sqrt(data.E_tot / data.m)
    return np.array(
        [
            log_product(4 / gamma, energy, np.delete(network.s, l), network.R[l])
            for l in range(network.D)
        ]
    )


def graf_bound(network, data, delta, gamma):
    """Graf et al. 2022: Theorem 3.5, first bound, of "On Measuring Excess Capacity in Neural
    Networks" (NeurIPS 2022).

    Distances taken from zero, no union over norms.
    """
    m = data.m
    H = (1 / np.arange(1, m)).sum()
    C = np.exp(_graf_logs(network, data, gamma) * 2 / 3)  # to the power of 2/3
    covering = np.sqrt(np.log(2 * network.W.max())) * np.ceil(C).sum() ** (3 / 2)
    R = 4 / m + product(12 * H / np.sqrt(m), covering)
    return 2 * R + 3 * np.sqrt(np.log(2 / delta) / (2 * m))


def sedghi_bound(network, data, delta, gamma):
    """Long and Sedghi 2020: Theorem 2.1 of "Generalization Bounds for Deep Convolutional Neural
    Networks" (ICLR 2020).

    Its unspecified constant is set to 1, so it is a complexity measure, comparable in shape and not
    in level. Distances are taken from zero after the layers are rescaled to equal operator norms,
    which leaves the function unchanged, without union over norms. The theorem is about a loss that
    is Lipschitz in the outputs, and gamma does not enter.
    """
    beta = network.D * product(network.s ** (1 / network.D))
    return beta * np.sqrt(network.W.sum() / data.m) + np.sqrt(np.log(1 / delta) / data.m)


def corrected_bound(network, data, delta, gamma):
    """Corrected bound: `our_bound` with the classifier's own fan-in and its number of classes in
    it.

    Derived here, see docs/bounds.md: the classifier is peeled in the group norm N21, the sum of the
    l2 norms over channels of its rows cut into positions, which is `b` of the last layer.
    """
    rho = product(network.b[-1], network.F[:-1])
    log_paths = np.log(network.c[-1]) + (network.D - 1) * np.log(2) + np.log(network.deg).sum()
    energy = np.sqrt(product(network.deg[:-1], data.E_max))
    complexity = (1 + np.sqrt(2 * log_paths)) * energy / data.m
    return product(4 * (rho + 1) / gamma, complexity) + tail(rho, data.m, delta)


def path_bound(network, data, delta, gamma):
    """Gonon et al. 2024: after the path-norm theorem of "A path-norm toolkit for modern networks"
    (ICLR 2024), for margins.

    Their Theorem 3.1 is about expectations; docs/bounds.md derives the bound with probability 1 -
    delta, with E_coord for m times the largest square of an input, and for a bias-free chain
    without max pooling with a smaller constant. It covers biases, batch normalization, pooling and
    skip connections.
    """
    r, D, K, P = network.path_norm, network.path_depth, max(1, network.pool), network.pool > 0
    if network.chain:
        log_N = D * np.log(2) + np.log(data.inputs * network.outputs)
    else:
        log_N = D * np.log((3 + 2 * P) * K) + np.log(
            (3 + 2 * P) / (1 + P) * (data.inputs + 1) * network.outputs
        )
    energy = (
        max(data.E_coord, data.m) if network.biased else data.E_coord
    )  # a bias is a coordinate that is always 1
    return product(4 * (r + 1) / gamma, np.sqrt(2 * log_N * energy) / data.m) + tail(
        r, data.m, delta
    )


def graf_params_bound(network, data, delta, gamma):
    """Graf et al. 2022 (parameters): the second bound of the same theorem as `graf_bound`, which
    counts weights."""
    logs = 2 * np.log(network.D) + 2 * _graf_logs(network, data, gamma)  # of D^2 C_l^2
    ceilings = np.log1p(np.ceil(np.exp(np.minimum(logs, 40)))) + np.maximum(
        logs - 40, 0
    )  # log(1 + ceil(D^2 C_l^2))
    psi = np.where(logs > -np.inf, 2.7, 0)
    R = 12 / np.sqrt(data.m) * np.sqrt((2 * network.W * (ceilings + psi)).sum())
    return 2 * R + 3 * np.sqrt(np.log(2 / delta) / (2 * data.m))


def bartlett_bound(network, data, delta, gamma):
    """Bartlett et al. 2017: as Lemma A.8 of "Spectrally-normalized margin bounds for neural
    networks" (NeurIPS 2017).

    On the layers' Toeplitz matrices, distances from zero, no union over norms. Their covering
    number of the margin losses on the sample, log N(eps) = K / eps^2 with sqrt(K) = (2 / gamma)
    sqrt(E_tot log(2 Wbar^2)) lip (sum_l (A_l / s_l)^(2/3))^(3/2), goes into Dudley's integral 4
    alpha / sqrt(m) + 12 / m * (integral from alpha to sqrt(m) of sqrt(log N(eps)) d eps). At alpha
    = 1 / sqrt(m) the first term is 4 / m, and the integral of sqrt(K) / eps is sqrt(K) log(m). The
    lemma as printed takes alpha = 1 / m, and is larger.
    """
    m = data.m
    terms = np.array(
        [product(np.delete(network.s, l), network.A[l]) for l in range(network.D)]
    )  # lip A_l / s_l
    covering = 2 / gamma * np.sqrt(data.E_tot * np.log(2 * network.u.max() ** 2))
    R = 4 / m + product(12 * np.log(m) / m * covering, (terms ** (2 / 3)).sum() ** (3 / 2))
    return 2 * R + 3 * np.sqrt(np.log(2 / delta) / (2 * m))


def neyshabur_bound(network, data, delta, gamma):
    """Neyshabur et al. 2018: Theorem 1 of "A PAC-Bayesian approach to spectrally-normalized margin
    bounds" (ICLR 2018).

    With the constants of its proof, on the layers' Toeplitz matrices rescaled to equal operator
    norms beta = lip^(1/D), no union over the grid of norms. The posterior's noise is sigma = gamma
    / (42 D B beta^(D-1) sqrt(h log(4 D h))), and the divergence sum_l (T_l beta / s_l)^2 / (2
    sigma^2); there beta^(D-1) T_l beta / s_l is the product of T_l and the others' s.
    """
    D, m, h = network.D, data.m, network.u.max()
    terms = [product(network.T[l], np.delete(network.s, l)) for l in range(D)]
    root_KL = product(
        42 * D * data.B / gamma, np.sqrt(h * np.log(4 * D * h) / 2), np.hypot.reduce(terms)
    )
    return (
        4 * np.hypot(root_KL, np.sqrt(np.log(6 * m / delta))) / np.sqrt(m - 1) if m > 1 else np.inf
    )


MARGINS = 2.0 ** np.arange(
    -4, 2.5, 0.5
)  # the fixed grid of margins over which the certificate takes its union


def _certificates(network, data, delta):
    """err_S^gamma + the smaller of two bounds, each at confidence delta / (2 |MARGINS|), for each
    gamma of MARGINS."""
    delta = delta / (2 * len(MARGINS))
    least = [
        min(bound(network, data, delta, gamma) for bound in (corrected_bound, path_bound))
        for gamma in MARGINS
    ]
    return [margin_error(network.margins, gamma) + bound for gamma, bound in zip(MARGINS, least)]


def certified_error(network, data, delta, gamma):
    """Certified error: an upper bound on the expected 0-1 error itself, with probability 1 - delta.

    The least certificate over the grid MARGINS, so gamma does not enter. 1 means that it says
    nothing.
    """
    return min(1.0, *_certificates(network, data, delta))


def certified_margin(network, data, delta, gamma):
    """Certified margin: the gamma of MARGINS at which the certificate, before it is cut off at 1,
    is least."""
    return MARGINS[np.argmin(_certificates(network, data, delta))]


BOUNDS = {
    'our_bound': our_bound,
    'golowich_bound': golowich_bound,
    'ledent_bound': ledent_bound,
    'graf_bound': graf_bound,
    'sedghi_bound': sedghi_bound,
    'corrected_bound': corrected_bound,
    'certified_error': certified_error,
    'certified_margin': certified_margin,
    'path_bound': path_bound,
    'graf_params_bound': graf_params_bound,
    'bartlett_bound': bartlett_bound,
    'neyshabur_bound': neyshabur_bound,
}


def evaluate_bounds(net, data, margins, delta=0.001, gamma=1.0, skip_uncovered=False):
    """Every bound of BOUNDS on a trained network in evaluation mode.

    evaluate_bounds(net, images, labels) measures what they ask for. A program that evaluates a
    network many times measures its data once, and passes the table and the margins instead.

    Args:
        net: a network as `trace_layers` takes it.
        data: the training images (m, C, H, W), exactly as the network sees them, or their table of
            `measure_data(net, images)`.
        margins: the labels (m,) trained on, or, with a table, the margins (m,) of the training
            samples, `classification_margins(outputs(net, images), labels)`.
        delta: the bounds hold with probability at least 1 - delta.
        gamma: margin.
        skip_uncovered: for a network that is not covered, give nan for each bound whose measures
            are missing, instead of refusing it; of images and labels a warning then says why.
            `path_norm` and `path_bound` cover more networks than the others.
    Returns:
        {column: float} with rho = prod F, prod_ratio = prod s / F (0 for a dead layer), norm_ratio,
        path_norm, and each bound, which is inf where it is too large for a float.
    Raises:
        NotCovered: the network is not covered by the theorems; all that is in the way is named.
        BadInput: its weights contain NaN, the margins are of another set, delta or gamma is out of
            range, or a bound returns no number.
    """
    if not 0 < delta < 1:
        raise BadInput(f'delta = {delta}: must lie between 0 and 1')
    if not 0 < gamma < np.inf:
        raise BadInput(f'gamma = {gamma}: must be positive')
    margins = torch.as_tensor(margins).detach()
    measured = isinstance(data, Table)
    if not measured:
        images, labels = data, margins
        data = measure_data(net, images, skip_uncovered)
        margins = classification_margins(outputs(net, images), labels)
    if margins.shape != (data.m,):
        shape = tuple(margins.shape)
        raise BadInput(
            f'margins of shape {shape} for {data.m} training samples: must be ({data.m},)'
        )
    network = measure_network(net, data.input_shape, margins, skip_uncovered)
    if not measured:
        for reason in sorted({*network.missing.values()}):
            warnings.warn(f'some bounds are nan: {reason}', stacklevel=2)
    row = {
        'rho': getattr(network, 'rho', np.nan),
        'prod_ratio': getattr(network, 'prod_ratio', np.nan),
        'norm_ratio': data.norm_ratio,
        'path_norm': getattr(network, 'path_norm', np.nan),
    }
    row |= bounds_of(network, data, delta, gamma, skip_uncovered)
    return {column: float(value) for column, value in row.items()}


@np.errstate(over='ignore', under='ignore')
def bounds_of(network, data, delta, gamma, skip_uncovered=False):
    """{column: float} of every bound of BOUNDS, from the tables that `evaluate_bounds` measures."""
    row = {}
    for column, bound in BOUNDS.items():
        try:  # on copies, so that a bound that changes its tables changes no other
            value = bound(copy.deepcopy(network), copy.deepcopy(data), delta, gamma)
        except NotCovered:
            if not skip_uncovered:
                raise
            value = np.nan
        except AttributeError as error:
            if not isinstance(error.obj, Table):
                raise
            raise BadInput(f'{column} of BOUNDS: {error}') from None
        try:
            row[column] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(
                f'{column} of BOUNDS returns a {type(value).__name__}; it must return a number'
            ) from None
    return row

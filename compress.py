"""Make trained networks narrower: the multi-task lasso of each next layer says which channels it can do without.

python compress.py results/7 --lam 1e-4 1e-3 1e-2   every network of the folder, once per lam
"""

import argparse
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from conf import ROOT, BadInput, Parser, settings_text
from evaluation import evaluate
from harness import launch
from harness.machine import choose_precision, guarded, keep_freed_memory
from harness.records import (
    csv_line,
    folder_settings,
    load_checkpoint,
    load_network,
    new_results_folder,
    save_checkpoint,
    write_file,
)
from measures.geometry import trace_layers
from measures.lasso import group_lasso, norms, ridge, scaled, squared_residual
from measures.norms import measure_data
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.pac_bayes import test_set_bound
from utils import BOUNDS

FIT_IMAGES = 10_000  # at most so many are fitted to, evenly spaced
GRAM_COLUMNS = 12_000  # the largest Gram matrix that is formed, 1.1 GiB; beyond it the features themselves are kept
FEATURE_BYTES = 2**31  # ... of as many images as fit into this
CHUNK = 2**23  # features at once where they are summed up
COLUMNS = 'lam, channels, weights, residual, gap, train_error, test_error, rho, prod_ratio, norm_ratio, path_norm'.split(', ')
COLUMNS += [*BOUNDS, *CERTIFICATES, 'test_set_bound', 'test_size']


def balance(net, input_shape):
    """The same function with the least product of Frobenius norms: each neuron's incoming and outgoing weights equal in norm.

    Rescaling neuron k by a > 0 turns (w_k, v_k) into (a w_k, v_k / a). Balancing one layer after the other descends the sum
    of squares of all weights, which is convex in the logarithms of the factors. A neuron that is fed by nothing or feeds
    nothing becomes zero on both sides.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
    Returns:
        An nn.Sequential of plain layers.
    """
    layers, weights = _tensors(net, input_shape)
    return _sequential(layers, _balanced(weights))


@torch.no_grad()
def compress(net, images, lam, refit='ridge', tolerance=1e-3):
    """A narrower network of nearly the same function, from unlabelled training images.

    From the input on, layer l + 1 is fitted anew to the features of layer l, with a group lasso whose groups are the
    channels of layer l, weighted by the norms of their filters:

        min_V  1/(2N) ||V Phi - Psi||_F^2  +  lam lam_max sum_k ||w_k|| ||V_k||_F

    Phi are the patches of the narrow network's features, Psi the original network's pre-activations, so that later layers
    repair what earlier ones lost. Channels with V_k = 0 are dropped, and the network is balanced before the first and after
    each fit.

    Args:
        net: a network as `trace_layers` takes it.
        images: (m, C, H, W) training images, as the network sees them; at most FIT_IMAGES of them are used.
        lam: share of lam_max, from which on no channel is kept; 0 < lam < 1.
        refit: 'none' keeps the lasso's weights, which are shrunk; 'ridge' fits the kept channels once more, under a tenth
            of the penalty's quadratic majorizer at the solution. (With no penalty at all the norms explode.)
        tolerance: of the duality gap, relative to the objective.
    Returns:
        (nn.Sequential, report): a dict per hidden layer of channels (kept), residual (||V Phi - Psi|| / ||Psi|| after the
        refit), gap (relative to the objective) and steps.
    Raises:
        BadInput: an argument that makes no sense, a network that is not covered, or a lam at which a layer dies.
    """
    if not 0 < lam < 1:
        raise BadInput(f'lam = {lam:g}: must be a share of lam_max, between 0 and 1')
    if refit not in ('none', 'ridge'):
        raise BadInput(f'refit = {refit!r}: must be none or ridge')
    if images.dim() != 4 or not len(images) or not images.isfinite().all():
        raise BadInput(f'images of shape {tuple(images.shape)}: must be (m, C, H, W), at least one, without NaN or infinity')
    layers, weights = _tensors(net, tuple(images.shape[1:]))
    original = narrow = _balanced(weights)
    report = []
    for index in range(1, len(layers)):
        problem = _problem(layers[: index + 1], narrow[:index], original[: index + 1], images)
        costs = narrow[index - 1].flatten(1).norm(dim=1)
        # In U_k = c_k V_k every channel costs the same, and rescaling channels changes not a single step. Dead ones stay 0.
        scale = torch.where(norms(problem.cross) > 0, 1 / costs, 0)[:, None]
        problem = scaled(problem, scale)
        start = torch.where(scale > 0, narrow[index].flatten(2) * costs[:, None], 0)
        U, lasso = group_lasso(problem, lam, start, tolerance)
        kept = norms(U) > 0
        if not kept.any():
            raise BadInput(f'lam = {lam:g}: layer {layers[index - 1].name} loses all its channels; choose a smaller lam')
        penalty = lasso.pop('penalty')
        if refit == 'ridge':
            U = ridge(problem, 0.1 * penalty / norms(U), U)
        residual = squared_residual(problem, U, problem.gram(U)) / problem.energy
        report.append({'channels': int(kept.sum()), 'residual': math.sqrt(max(0.0, residual))} | lasso)
        V = (U * scale)[:, kept].unflatten(2, narrow[index].shape[2:])
        narrow = _balanced([*narrow[: index - 1], narrow[index - 1][kept], V, *narrow[index + 1 :]])
    return _sequential(layers, narrow), report


def _problem(layers, narrow, original, images):
    """The least-squares problem of the last of `layers`: fit its original pre-activations Psi to the narrow features Phi.

    Its Gram matrix is summed up in float64. Where it would be too large, the features are kept instead, of as many images as
    memory allows.
    """
    *before, layer = layers
    positions = layer.taps[0].shape[1] * layer.taps[1].shape[1]
    columns = len(narrow[-1]) * math.prod(layer.shape[2:])
    dense = columns <= GRAM_COLUMNS
    most = FIT_IMAGES if dense else FEATURE_BYTES // (columns * positions * images.element_size())
    images = images[:: -(-len(images) // max(1, min(most, FIT_IMAGES)))]
    gram, cross, energy, features = 0, 0, 0, []
    for batch in images.split(max(1, CHUNK // (columns * positions))):
        targets = _forward(layer, original[-1], _features(before, original, batch))
        targets = targets.flatten(2).transpose(0, 1).flatten(1).double()
        phi = F.unfold(_features(before, narrow, batch), layer.shape[2:], layer.dilation, layer.padding, layer.stride)
        phi = phi.transpose(0, 1).flatten(1)
        if dense:
            gram = gram + phi.double() @ phi.double().T
        else:
            features.append(phi)
        cross, energy = cross + targets @ phi.double().T, energy + targets.square().sum().item()
    N, shape = len(images) * positions, (-1, len(narrow[-1]), math.prod(layer.shape[2:]))

    def times_gram(V):
        V = V.flatten(1)
        product = V @ gram if dense else sum((V @ (phi := part.double())) @ phi.T for part in features)
        return (product / N).view(shape)

    return SimpleNamespace(gram=times_gram, cross=(cross / N).view(shape), energy=energy / N)


def _tensors(net, input_shape):
    """The layers of a network and their weights, each as a convolution's (out, in, h, w) in float64."""
    layers = trace_layers(net, input_shape)
    weights = [layer.module.weight.detach().double().reshape(layer.shape) for layer in layers]
    for layer, weight in zip(layers, weights):
        if not weight.isfinite().all():
            raise BadInput(f'{type(net).__name__}: the weights of {layer.name} contain NaN or infinity')
    return layers, weights


def _balanced(weights, tolerance=1e-12):
    weights = list(weights)
    change = 1.0
    while change > tolerance:
        change = 0.0
        for index in range(len(weights) - 1):
            incoming, outgoing = (
                weights[index].flatten(1).norm(dim=1),
                weights[index + 1].transpose(0, 1).flatten(1).norm(dim=1),
            )
            alive = (incoming > 0) & (outgoing > 0)
            factor = torch.where(alive, (outgoing / incoming).sqrt(), 0)
            weights[index] = weights[index] * factor[:, None, None, None]
            weights[index + 1] = weights[index + 1] * torch.where(alive, 1 / factor, 0)[:, None, None]
            change = max([change, *(factor[alive].log().abs().tolist())])
    return weights


def _forward(layer, weight, maps):
    """One layer, seen as a convolution, on maps (N, in, h, w)."""
    return F.conv2d(maps, weight.to(maps.dtype), None, layer.stride, layer.padding, layer.dilation)


def _features(layers, weights, images):
    """The post-activation maps (N, K, h, w) that the layers make of images."""
    for layer, weight in zip(layers, weights):
        images = _forward(layer, weight, images).relu()
    return images


def _sequential(layers, weights):
    """The chain of plain layers with these weights (out, in, h, w), of the dtype of the traced ones."""
    modules = []
    for layer, weight in zip(layers, weights):
        if layer.module.weight.ndim == 4:
            geometry = layer.shape[2:], layer.stride, layer.padding, layer.dilation
            module = nn.Conv2d(*weight.shape[1::-1], *geometry, bias=False, device='meta')
        else:
            weight = weight.flatten(1)
            modules += [] if any(isinstance(module, nn.Flatten) for module in modules) else [nn.Flatten()]
            module = nn.Linear(*weight.shape[::-1], bias=False, device='meta')
        module.weight = nn.Parameter(weight.to(layer.module.weight.dtype))
        modules += [module, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def save(path, net, input_shape):
    """Saves a network, as `trace_layers` takes it, by the weights and the geometry of its layers."""
    layers = trace_layers(net, input_shape)
    fields = ('stride', 'padding', 'dilation')
    geometry = [{field: list(getattr(layer, field)) for field in fields} for layer in layers]
    weights = [layer.module.weight.detach().cpu() for layer in layers]
    save_checkpoint(path, {'input_shape': list(input_shape), 'weights': weights, 'geometry': geometry})


def load(path):
    """The compressed network of a file, an nn.Sequential on the CPU: load('results/8/CONV-3-200/lam-0.001.pt').

    Raises:
        BadInput: there is no such file, or it holds no compressed network.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f'{path}: no such file')
    saved = load_checkpoint(path, 'cpu')
    try:
        layers = [
            SimpleNamespace(module=SimpleNamespace(weight=weight), shape=weight.shape, **geometry)
            for weight, geometry in zip(saved['weights'], saved['geometry'], strict=True)
        ]
        net = _sequential(layers, saved['weights'])
        trace_layers(net, tuple(saved['input_shape']))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise BadInput(f'{path}: does not hold a compressed network') from None
    return net


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def compress_run(net, settings, lams, refit, folder):
    """Compresses one trained network once per lam into `folder`: weights, and a row of compress.csv; row 0 is the source.

    The widths of a narrower network are chosen by the training data, so each bound holds at delta over the number of choices
    there are; the test set has nothing to pay for. Returns the errors of the lams at which a layer died.
    """
    device, dataset = launch.get_inputs(settings)
    choose_precision('float32', device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    net, images = net.to(device), dataset.train_images
    hidden = [layer.shape[0] for layer in trace_layers(net, dataset.input_shape)[:-1]]
    data, united = measure_data(net, images), SimpleNamespace(**vars(settings) | {'delta': settings.delta / math.prod(hidden)})
    lines, errors = [], []
    with tqdm(total=1 + len(lams), desc=settings.name, miniters=0, disable=not sys.stdout.isatty()) as bar:

        for lam in (0, *lams):
            try:
                narrow, report = compress(net, images, lam, refit) if lam else (balance(net, dataset.input_shape), [])
            except BadInput as error:
                errors.append(f'{settings.name}: {error}')
                continue
            row = {'lam': lam, 'channels': '|'.join(str(layer['channels']) for layer in report) or '|'.join(map(str, hidden))}
            row |= {'residual': '|'.join(f'{layer["residual"]:.3g}' for layer in report)}
            row |= {'gap': max((layer['gap'] for layer in report), default=0.0)}
            row |= {'weights': sum(weight.numel() for weight in narrow.parameters())}
            row |= evaluate(narrow, united, dataset, data, settings.prune_rounds, settings.epochs)
            row |= {'test_set_bound': test_set_bound(row['test_error'], len(dataset.test_images), settings.delta)}
            lines.append(csv_line(row, COLUMNS))
            folder.mkdir(exist_ok=True)
            save(folder / f'lam-{lam}.pt', narrow, dataset.input_shape)
            write_file(folder / 'compress.csv', (','.join(COLUMNS) + '\n' + ''.join(lines)).encode())
            bar.update()
            words = f'{row["channels"]} channels, {row["weights"]} weights, rho {row["rho"]:.4g}'
            bar.write(f'{settings.name} lam {lam:g}: {words}, train {row["train_error"]:.4f} test {row["test_error"]:.4f}')
    return errors


def parse_arguments(argv):
    """The command line as a namespace of source, lam, refit and run. Raises BadInput."""
    parser = Parser(
        prog='compress.py', allow_abbrev=False, argument_default=argparse.SUPPRESS, description=__doc__.partition('\n')[0]
    )
    add = parser.add_argument
    add('source', type=Path, metavar='DIR', help='results folder of the trained networks')
    lam_help = 'penalties, as shares of the one from which on nothing is left; between 0 and 1'
    add('--lam', type=float, nargs='+', required=True, metavar='X', help=lam_help)
    refit_help = 'fit the kept channels once more with a small ridge penalty (default), or keep the shrunk weights'
    add('--refit', choices=('none', 'ridge'), help=refit_help)
    add('--run', type=int, metavar='K', help='only the K-th network of the folder, counted from 1')
    return SimpleNamespace(**({'refit': 'ridge', 'run': None} | vars(parser.parse_args(argv))))


def run(options):
    """Does what the command line says. Returns the exit status."""
    if bad := [lam for lam in options.lam if not 0 < lam < 1]:
        raise BadInput(f'--lam {bad[0]:g}: must be a share of lam_max, between 0 and 1')
    if not (options.source / 'global_settings.py').is_file():
        raise BadInput(f'{options.source}: not a results folder, it has no global_settings.py')
    sweep, runs = folder_settings(options.source)
    if options.run is not None and not 1 <= options.run <= len(runs):
        raise BadInput(f'--run {options.run}: the folder has the networks 1 to {len(runs)}')
    chosen = runs if options.run is None else [runs[options.run - 1]]
    trained = []
    for settings in chosen:
        net, _ = load_network(options.source / settings.name)
        device, dataset = launch.get_inputs(settings)
        if len(trace_layers(net, dataset.input_shape)) < 2:
            raise BadInput(f'{settings.name}: has no hidden layer to make narrower')
        trained.append((net, settings))

    lams = sorted(set(options.lam))
    folder = Path(os.path.relpath(new_results_folder(ROOT / sweep['results_dir'])))
    what = f'python compress.py {options.source} --lam {" ".join(map(str, lams))} --refit {options.refit}'
    what += f' --run {options.run}' * (options.run is not None)
    header = [f'Networks made narrower by {what}; the settings are those that they were trained with.']
    header += launch.launch_header(device, [])
    write_file(folder / 'global_settings.py', settings_text(sweep, header).encode())
    keep_freed_memory()
    errors = []
    for net, settings in trained:
        print(f'{folder / settings.name}: from {options.source / settings.name}', flush=True)
        errors += compress_run(net, settings, lams, options.refit, folder / settings.name)
    launch.draw(folder)
    if errors:
        raise BadInput('; '.join(errors))
    return 0


def main(argv=None):
    """Runs the command line. Returns 0, 1 where the results cannot be written, 2 for bad input, 128 + signal where stopped."""
    return guarded('compress.py', lambda: run(parse_arguments(argv)), lambda: '; the rows that are done are kept')


if __name__ == '__main__':
    sys.exit(main())

"""The tables that bounds are formulas of: norms of layers, energies of the data, and margins."""

import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from conf import BadInput
from measures.paths import measure_paths
from measures.steps import NotCovered
from measures.trace import not_covered, trace_layers

# What `measure_network` measures of the layers of a chain, and what `measure_paths` measures of
# more networks.
LAYER_MEASURES = tuple('F T s a b R deg A p c W u r rho D prod_ratio'.split())
PATH_MEASURES = 'path_norm', 'path_depth', 'pool', 'biased', 'chain', 'outputs'


class Table(SimpleNamespace):
    """Measures by name. To read one of `missing`, {measure: reason}, raises NotCovered."""

    def __getattr__(self, name):  # called for what the table does not have
        missing = vars(self).get('missing', {})
        if name in missing:
            raise NotCovered(f'{name} is not measured: {missing[name]}')
        known = ', '.join(measure for measure in vars(self) if measure != 'missing')
        raise AttributeError(f'no measure {name}; there are {known}', name=name, obj=self)


def operator_norm(weight, in_size, stride=1, padding=0, dilation=1, tolerance=1e-5):
    """Spectral norm of the linear map x -> conv2d(x, weight) on zero-padded maps of its real size.

    Lanczos iteration on the convolution followed by its transpose, A'A, with full
    reorthogonalization: the same two convolutions a step as power iteration, and hundreds of times
    fewer steps where the largest singular values lie close together, as those of a convolution do.
    It ends when the residual of the largest Ritz value is below `tolerance` times that value: some
    squared singular value then lies within that. That it is the largest one is a matter of the
    start: there are two, random and fixed, so that the value depends only on the weight, and a
    further one wherever the iteration breaks down because the map annihilates what is left of a
    start. `dft_norm` is an upper bound.

    Args:
        weight: (out_channels, in_channels, kh, kw), with entries far from overflow in float64
            squares.
        in_size: (height, width) of the input map.
    """
    weight = _kernel(weight)
    shape = (1, weight.shape[1], *in_size)
    generator = torch.Generator().manual_seed(0)

    def start():
        vector = torch.randn(math.prod(shape), generator=generator, dtype=torch.float64)
        vector = vector.to(weight.device)
        return vector / vector.norm()

    def square(vector):
        image = F.conv2d(vector.view(shape), weight, None, stride, padding, dilation)
        image = torch.nn.grad.conv2d_input(shape, weight, image, stride, padding, dilation)
        return image.flatten()

    starts = [start(), start()]
    nothing = 1e-10 * max((square(vector) @ vector).item() for vector in starts)
    largest = [_lanczos(square, vector, start, nothing, tolerance) for vector in starts]
    return math.sqrt(max(0.0, *largest))


def _lanczos(square, vector, start, nothing, tolerance):
    """The largest eigenvalue of a positive semidefinite map `square`.

    What is shorter than `nothing` is taken for rounding, and `start` gives a further random vector.
    In the orthonormal basis of the vectors so far the map is tridiagonal: alphas on the diagonal,
    betas beside it.
    """
    size = len(vector)
    # It grows where it must: few steps are the rule, and `size` may be millions.
    basis = vector.new_empty(min(size, 64), size)
    alphas, betas = [], []

    def orthogonal(image):
        # Against the whole basis: the three-term recursion loses orthogonality to rounding just as
        # a Ritz value converges, and finds it again and again. One pass leaves a remainder of the
        # digits that cancelled, which the second one takes away.
        for _ in range(2):
            image = image - (basis[: step + 1] @ image) @ basis[: step + 1]
        return image

    for step in range(size):
        if step == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[step] = vector
        image = square(vector)
        alphas.append(image @ vector)
        image = orthogonal(image)
        norm = image.norm()
        # Below `nothing` the basis spans an invariant space, and the tridiagonal matrix falls into
        # blocks here.
        betas.append(norm if norm > nothing else torch.zeros_like(norm))
        # Not at every step, since the small eigenproblem costs more than a convolution, and each
        # waits for the device.
        if step % 8 == 7 or step == size - 1:
            off = torch.stack(betas)
            ritz = torch.diag(torch.stack(alphas))
            ritz = ritz + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
            values, vectors = torch.linalg.eigh(ritz.cpu())
            # |A'A x - largest x| of the Ritz vector x = V y is the last beta times the last entry
            # of y.
            largest, residual = values[-1].item(), off[-1].item() * abs(vectors[-1, -1].item())
            if residual <= tolerance * largest and step >= 15:
                break
        # A larger eigenvalue may lie outside an invariant space: continue from a random vector
        # there.
        if not betas[-1] and step < size - 1:
            image = orthogonal(start())
            norm = image.norm()
        vector = image / norm
    return largest


def dft_norm(weight, in_size, padding=0, dilation=1):
    """An upper bound on the spectral norm of x -> conv2d(x, weight) on zero-padded maps.

    Whatever its stride, the padded convolution is a part of the rows and columns of the circular
    one on the padded map, which the discrete Fourier transform makes block diagonal: the bound is
    the largest spectral norm of a block, an (out_channels, in_channels) matrix for each frequency
    (Sedghi, Gupta, Long 2019). Exact up to the rounding of float64.

    Args:
        weight: (out_channels, in_channels, kh, kw).
        in_size: (height, width) of the input map.
        padding, dilation: a number, or one for each axis.
    """
    weight = _kernel(weight)
    scale = weight.abs().max().item()  # taken out, so that no square over- or underflows
    if scale == 0:
        return 0.0
    axes = zip(in_size, weight.shape[2:], _pair(padding), _pair(dilation), (False, True))
    rows, columns = (_phases(*axis).to(weight.device) for axis in axes)
    phases = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1).flatten(1)
    taps = (weight / scale).flatten(2).movedim(2, 0).flatten(1).to(phases.dtype)
    largest = 0.0
    for chunk in phases.split(max(1, 2**22 // taps.shape[1])):
        blocks = (chunk @ taps).view(-1, *weight.shape[:2])
        if blocks.shape[1] > blocks.shape[2]:
            blocks = blocks.mH
        values = torch.linalg.eigvalsh(blocks @ blocks.mH)
        largest = max(largest, values[:, -1].max().item())
    return scale * math.sqrt(largest)


def _kernel(weight):
    """The weight of a convolution in float64. Raises BadInput."""
    if weight.ndim != 4 or not weight.numel() or weight.is_complex():
        given = f'{weight.dtype} of shape {tuple(weight.shape)}'
        raise BadInput(f'weight: {given}: must be real numbers (out, in, height, width)')
    if not weight.isfinite().all():
        raise BadInput('weight: contains NaN or infinity')
    return weight.detach().double()


def _phases(size, taps, padding, dilation, half):
    """exp(-2 pi i f t / n) of the frequencies f and taps t along an axis, (frequencies, taps).

    With `half` the frequencies whose complex conjugates are the others, as the weights are real.
    """
    size = max(size + 2 * padding, dilation * (taps - 1) + 1)
    frequencies = torch.arange(size // 2 + 1 if half else size, dtype=torch.float64)
    turns = frequencies[:, None] * torch.arange(taps) * dilation % size / size
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns)


@np.errstate(over='ignore')
def product(*factors):
    """Product of nonnegative numbers and arrays, by their logarithms, so that no partial product
    over- or underflows.

    It is inf only if the product itself is too large for a float, and 0 only if a factor is, even
    beside an infinite one: a dead layer makes f zero.
    """
    log = log_product(*factors)
    return 0.0 if log == -math.inf else max(np.exp(log), np.finfo(float).tiny)


def log_product(*factors):
    """The logarithm of `product`, -inf for 0."""
    factors = np.concatenate([np.ravel(factor) for factor in factors])
    return np.log(factors).sum() if factors.all() else -math.inf


@torch.no_grad()
def measure_network(net, input_shape, margins=None, skip_uncovered=False):
    """Everything that the bounds ask of a network, on its input of the given shape.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
        margins: (m,) classification margins of the training samples; only the certificates need
            them.
        skip_uncovered: leave out what is not covered, instead of refusing the network: a table
            without the measures of the layers, or even without those of the paths.
    Returns:
        Namespace of arrays with an entry per weight layer l = 1..D, the classifier last:
            F    Frobenius norm of the weight tensor
            T    Frobenius norm of the layer's full linear map, its Toeplitz matrix
            s    operator norm of the same map
            a    sum over filters of the filter's l2 norm; classifier: F
            b    sum over filters and taps of the l2 norm over input channels; a linear layer's taps
                 are the map's positions
            R    the same, but a linear layer has one tap: sum of the l2 norms of its rows
            deg  largest number of input positions that feed one output position
            A    sum over output units of the l2 norm of the unit's incoming weights, taps in the
                 padding left out
            p    output positions
            c    output channels
            W    number of weights
        of u, the number of units of each layer, that of the inputs first; of r (the largest l2 norm
        of a classifier row), rho = prod F, prod_ratio = prod s / rho (0 for a dead layer), D, what
        `measure_paths` returns, and margins. To read a measure that was left out raises NotCovered,
        with the reason.
    Raises:
        BadInput: the network is not covered, or its weights contain NaN or infinity.
    """
    network, layers = Table(margins=margins, missing={}), []
    try:
        layers = trace_layers(net, input_shape)
        vars(network).update(_measure_layers(layers, input_shape))
    except NotCovered as error:
        if not skip_uncovered:
            raise
        network.missing |= dict.fromkeys(LAYER_MEASURES, str(error))
    try:
        vars(network).update(vars(measure_paths(net, input_shape)))
    except NotCovered as error:
        if not skip_uncovered:
            raise
        network.missing |= dict.fromkeys(PATH_MEASURES, str(error))
    return network


def _measure_layers(layers, input_shape):
    """{measure: value} of LAYER_MEASURES of the layers that `trace_layers` returns."""
    rows = [_measure_layer(layer) for layer in layers]
    table = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}
    table['r'] = table.pop('widest')[-1]
    table['a'][-1] = table['F'][-1]
    table['u'] = np.array([math.prod(input_shape), *table['p'] * table['c']])
    table['rho'], table['D'] = product(table['F']), len(layers)
    table['prod_ratio'] = product(table['s'] / np.where(table['F'] == 0, 1, table['F']))
    return table


def _measure_layer(layer):
    """{measure: number} of a layer; `widest` is the largest l2 norm of a filter."""
    weight = layer.kernel
    scale = weight.abs().max().item()  # taken out, so that no square over- or underflows
    weight = weight / (scale or 1.0)
    filters = weight.flatten(1)
    rows, columns = layer.taps
    # Output positions at which a tap reads the input.
    counts = np.outer(rows.sum((1, 2)), columns.sum((1, 2)))
    squares = weight.square().sum(1)  # of each filter at each tap
    # Whether a tap's position is in the input; then the squares that come into each output unit.
    read = [torch.from_numpy(axis.any(2)).to(squares) for axis in (rows, columns)]
    incoming = torch.einsum('fkl,ko,lp->fop', squares, *read)
    toeplitz = (squares.sum(0).cpu().numpy() * counts).sum()
    by_taps = scale * weight.norm(dim=1).sum().item()
    by_filters = scale * filters.norm(dim=1).sum().item()
    return {
        'F': scale * weight.norm().item(),
        'T': scale * math.sqrt(toeplitz),
        's': scale * _spectral_norm(layer, weight) if scale else 0.0,
        'a': by_filters,
        'b': by_taps,
        'R': by_filters if layer.is_linear else by_taps,
        'deg': rows.sum((0, 2)).max() * columns.sum((0, 2)).max(),
        'A': scale * incoming.sqrt().sum().item(),
        'p': rows.shape[1] * columns.shape[1],
        'c': len(weight),
        'W': weight.numel(),
        'widest': scale * filters.norm(dim=1).max().item(),
    }


def _spectral_norm(layer, weight):
    """The operator norm of a layer with another kernel (out, in, h, w)."""
    if not layer.is_linear:
        return operator_norm(weight, layer.in_size, **layer.geometry)
    matrix = weight.flatten(1)
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(torch.linalg.eigvalsh(gram)[-1].item())


@torch.no_grad()
def measure_data(net, images, skip_uncovered=False):
    """Everything that the bounds ask of the training data; it needs the network for its geometry
    alone.

    Args:
        net: a network as `trace_layers` takes it.
        images: (m, C, H, W), exactly as the network sees them.
        skip_uncovered: for a network that is not covered, leave P out instead of refusing it; to
            read it raises NotCovered.
    Returns:
        Namespace of
            m            number of samples
            E_max        max over input positions j of sum_i ||x_i[:, j]||^2, the norm over channels
            E_coord      max over input coordinates u, a channel of a position, of sum_i x_i[u]^2
            E_tot        sum_i ||x_i||^2
            B            max_i ||x_i||
            P            per layer, the largest l2 norm of the part of an image that one patch of
                         the layer sees, its receptive field; the whole image for the classifier
            norm_ratio   sqrt(E_tot / E_max)
            input_shape  (C, H, W)
            inputs       number of input coordinates
    Raises:
        BadInput: the network is not covered, or the images are none, or contain NaN or infinity.
    """
    if images.dim() != 4 or not len(images):
        raise BadInput(
            f'images of shape {tuple(images.shape)}: must be (m, channels, height, width), m >= 1'
        )
    input_shape = tuple(images.shape[1:])
    reason = not_covered(net, input_shape) if skip_uncovered else None
    fields = [] if reason else _receptive_fields(trace_layers(net, input_shape)[:-1], input_shape)
    fields = [[torch.from_numpy(axis).to(images.device) for axis in field] for field in fields]
    coordinates = 0.0
    largest = torch.zeros(len(fields) + 1, dtype=torch.float64, device=images.device)
    for chunk in images.split(2048):
        squares = chunk.double().square()
        coordinates = coordinates + squares.sum(0)
        squares = squares.sum(1)
        seen = [(rows @ squares @ columns.T).max() for rows, columns in fields]
        seen.append(squares.sum((1, 2)).max())
        largest = torch.maximum(largest, torch.stack(seen))
    energy = coordinates.sum(0)
    E_max, E_tot = energy.max().item(), energy.sum().item()
    if not math.isfinite(E_tot):
        raise BadInput('the images contain NaN or infinity, or numbers whose squares have no float')
    data = Table(
        missing={},
        m=len(images),
        E_max=E_max,
        E_coord=coordinates.max().item(),
        E_tot=E_tot,
        B=largest[-1].sqrt().item(),
        norm_ratio=math.sqrt(E_tot / E_max) if E_max else 0.0,
        input_shape=input_shape,
        inputs=math.prod(input_shape),
    )
    if reason:
        data.missing['P'] = reason
    else:
        data.P = largest.sqrt().cpu().numpy()
    return data


def _receptive_fields(layers, input_shape):
    """Per layer and axis, (outputs, pixels): 1 where an output position sees a pixel, else 0."""
    reach, fields = [np.eye(size) for size in input_shape[1:]], []
    for layer in layers:
        reach = [(taps.any(0) @ seen > 0).astype(float) for taps, seen in zip(layer.taps, reach)]
        fields.append(reach)
    return fields


def classification_margins(outputs, labels):
    """f(x_i)_{y_i} - max_{j != y_i} f(x_i)_j of each sample, (m,) float64, of outputs (m, C) and
    labels (m,).

    Raises:
        BadInput: the shapes do not fit, or a label is not one of 0 to C - 1.
    """
    if outputs.dim() != 2 or labels.shape != outputs.shape[:1] or not len(labels):
        shapes = f'outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)}'
        raise BadInput(f'{shapes}: must be (m, classes) and (m,), m at least 1')
    classes, whole = outputs.shape[1], labels.long()
    if labels.is_floating_point() or ((whole < 0) | (whole >= classes)).any():
        raise BadInput(
            f'labels out of range: {classes} outputs need integers from 0 to {classes - 1}'
        )
    outputs, labels = outputs.double(), whole
    own = outputs.gather(1, labels[:, None])
    return own[:, 0] - outputs.scatter(1, labels[:, None], -math.inf).amax(1)


def margin_error(margins, gamma):
    """err_S^gamma, the fraction of margins of at most gamma; err_S^0 is the 0-1 error, ties
    counting as errors."""
    return (~(margins > gamma)).double().mean().item()  # NaN is an error too

"""Datasets, measures of a network and of its training data, generalization bounds, and result folders.

The bounds are two steps: `measure_data` and `measure_network` measure once, then each bound is a formula of the two
tables, `delta` and `gamma`. All of it is evaluated in float64.
"""

import contextlib
import csv
import fcntl
import gzip
import hashlib
import http.client
import io
import math
import os
import struct
import tarfile
import urllib.request
import uuid
import warnings
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from tqdm import tqdm

from conf import BadInput

# ----------------------------------------------------------------------------------------------------------------------
# Datasets
# ----------------------------------------------------------------------------------------------------------------------

MAX_BYTES = 2**29  # no file of these datasets holds more; a damaged one cannot ask for more memory than this

_MNIST = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
_CIFAR10_BATCHES = [f'data_batch_{i}.bin' for i in range(1, 6)]


def _idx_downloads(folder, *md5s):
    return {f'{file}.gz': (f'{folder}/{file}.gz', md5) for file, md5 in zip(_MNIST, md5s)}


# dataset -> {file: (where it is downloaded from, its MD5)}
DOWNLOADS = {
    'MNIST': _idx_downloads(
        'https://ossci-datasets.s3.amazonaws.com/mnist',
        'f68b3c2dcbeaaa9fbdd348bbdeb94873',
        'd53e105ee54ea40749a09fcbcd1e9432',
        '9fb629c4189551a2d022fa330f9573f3',
        'ec29112dd5afa0611ce80d1b7f02629c',
    ),
    'FashionMNIST': _idx_downloads(
        'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com',
        '8d4fb7e6c68d591d4c3dfef9ec88bf0d',
        '25c81989df183df01b3e8a0aad5dffbe',
        'bef4ecab320f06d8554ea6380940ec79',
        'bb300cfdad3c16e7a12a480ee83cd310',
    ),
    'CIFAR10': {
        'cifar-10-binary.tar.gz': (
            'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
            'c32a1d4ab5d03f1284b67883e8d87530',
        )
    },
    'CIFAR100': {
        'cifar-100-binary.tar.gz': (
            'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
            '03b5dce01913d631647c71ecec9e9cb8',
        )
    },
    'SVHN': {
        'train_32x32.mat': ('http://ufldl.stanford.edu/housenumbers/train_32x32.mat', 'e26dedcc434d2e4c54c9b2d4a06d8373'),
        'test_32x32.mat': ('http://ufldl.stanford.edu/housenumbers/test_32x32.mat', 'eb5a983be6a315427106f1b164d9cef3'),
    },
}


@contextlib.contextmanager
def _readable(path):
    """Turns whatever a damaged file makes a reader raise into a BadInput that names the file and the mend."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f'{path}: {error}; delete the file to download it again') from None
    except PermissionError:
        raise BadInput(f'{path}: no permission to read it') from None
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error, struct.error, tarfile.TarError) as error:
        raise BadInput(f'{path}: damaged or truncated ({error}); delete the file to download it again') from None


def read_idx(path, item_shape):
    """The uint8 array (N, *item_shape) of an IDX file, gzip-compressed where its name ends in .gz.

    Raises:
        BadInput: not an IDX file of such items, truncated, damaged, or with bytes after its end.
    """
    with _readable(path), (gzip.open if Path(path).suffix == '.gz' else open)(path, 'rb') as file:
        dims = 1 + len(item_shape)
        header = file.read(4 + 4 * dims)
        magic, count, *shape = struct.unpack(f'>{1 + dims}I', header)
        if magic != 0x800 + dims:
            raise BadInput(f'its first bytes are {magic:#010x} where an IDX file of {dims} dimensions has {0x800 + dims:#010x}')
        if tuple(shape) != tuple(item_shape):
            raise BadInput(f'holds items of shape {tuple(shape)}, not {tuple(item_shape)}')
        size = count * math.prod(item_shape)
        if size > MAX_BYTES:
            raise BadInput(f'declares {count} items, more than any of these datasets has')
        data = file.read(size + 1)  # one byte more, to see the end of the file
        if len(data) != size:
            raise BadInput(f'holds {"more" if len(data) > size else "fewer"} bytes than the {size} that it declares')
    return np.frombuffer(data, np.uint8).reshape(count, *item_shape)


def read_cifar(archive, folder, members, label_bytes):
    """Images (N, 3, 32, 32) and labels (N,), uint8, of the binary CIFAR batches `members`.

    Args:
        archive: path of cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, or of the folder it unpacks to.
        folder: the batches' folder inside the archive.
        label_bytes: bytes before an image's pixels; the last of them is its label.
    Raises:
        BadInput: a batch is missing, truncated or not a whole number of records.
    """
    record, found = label_bytes + 3 * 32 * 32, {}
    with _readable(archive):
        if Path(archive).is_dir():
            for member in members:
                with open(Path(archive, member), 'rb') as file:
                    found[member] = file.read(MAX_BYTES + 1)
        else:
            # Read in one pass and by exact name, never unpacked, so that neither links nor `..` matter.
            wanted = {f'{folder}/{member}': member for member in members}
            total = 0
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode='r|') as tar:
                for entry in tar:
                    total += entry.size
                    if total > MAX_BYTES:
                        raise BadInput('unpacks to more than this dataset has')
                    if entry.isreg() and (name := os.path.normpath(entry.name)) in wanted:
                        found[wanted[name]] = tar.extractfile(entry).read()
                if len(stream.read(2**20)) == 2**20:  # to the end, where gzip checks its checksum
                    raise BadInput('goes on after its last member')
        for member in members:
            if member not in found:
                raise BadInput(f'has no {folder}/{member}')
            if not found[member] or len(found[member]) % record or len(found[member]) > MAX_BYTES:
                raise BadInput(f'{member} is not a whole number of records of {record} bytes')
        records = np.frombuffer(b''.join(found[member] for member in members), np.uint8).reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


def read_svhn(path):
    """Images (N, 3, 32, 32) and labels (N,), uint8, of an SVHN .mat file, where the label 10 means the digit 0."""
    try:
        import scipy.io
    except ImportError:
        raise BadInput('dataset_name = SVHN: its .mat files are read by scipy; pip install scipy') from None
    with _readable(path):
        try:
            shapes = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(str(path))}
            (*size, count), kind = shapes['X']
            if kind != 'uint8' or size != [32, 32, 3] or shapes['y'][0] != (count, 1) or count * 3072 > MAX_BYTES:
                raise BadInput('X and y are not 32x32 colour images and their labels')
            content = scipy.io.loadmat(str(path), variable_names=['X', 'y'])
        except (BadInput, OSError):
            raise
        except Exception as error:  # scipy's reader raises whatever a damaged field leads it to
            raise ValueError(f'{type(error).__name__}: {error}') from None
        labels = content['y'][:, 0]
        if not np.isin(labels, range(1, 11)).all():
            raise BadInput('has labels out of range 1 to 10')
    return content['X'].transpose(3, 2, 0, 1), (labels % 10).astype(np.uint8)


def _locate(dataset, data_dir, folders, names, file):
    """The first of `names` that exists in one of data_dir's `folders`; else `file`, downloaded to the first folder."""
    for folder in folders:
        for name in names:
            if (path := Path(data_dir, folder, name)).exists():
                return path
    path = Path(data_dir, folders[0], file)
    try:
        download(*DOWNLOADS[dataset][file], path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, BadInput):
            raise
        without = 'python train.py --settings conf/digits.py runs without it'
        raise BadInput(
            f'{dataset}: {file} is missing and could not be downloaded ({error}); put it into {path.parent}, or {without}'
        ) from None
    return path


def download(url, md5, path):
    """Downloads `url` to `path` with a progress bar, by way of a temporary file that is moved once its MD5 fits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, 'wb') as file:
            total = int(response.headers.get('Content-Length') or 0) or None
            with tqdm(total=total, unit='B', unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if digest.hexdigest() != md5:
            raise BadInput(f'{url}: the download has MD5 {digest.hexdigest()}, not {md5}; try again or fetch it by hand')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _idx_splits(dataset):
    def read(data_dir):
        for split in ('train', 't10k'):
            arrays = []
            for kind, item_shape in (('images-idx3', (28, 28)), ('labels-idx1', ())):
                file = f'{split}-{kind}-ubyte'
                path = _locate(dataset, data_dir, (f'{dataset}/raw', dataset), (file, f'{file}.gz'), f'{file}.gz')
                arrays.append(read_idx(path, item_shape))
            yield path, arrays[0][:, None], arrays[1]

    return read


def _cifar_splits(dataset, file, folder, splits, label_bytes):
    def read(data_dir):
        path = _locate(dataset, data_dir, ('', dataset), (folder, file), file)
        for members in splits:
            yield path, *read_cifar(path, folder, members, label_bytes)

    return read


def _svhn_splits(data_dir):
    for split in ('train', 'test'):
        path = _locate('SVHN', data_dir, ('', 'SVHN'), (f'{split}_32x32.mat',), f'{split}_32x32.mat')
        yield path, *read_svhn(path)


def _digits_splits(data_dir):
    path = Path(__file__).resolve().parent / 'data' / 'digits.npz'  # ships with the project, whatever data_dir says
    with _readable(path):
        content = np.load(path)
        images, labels = content['images'][:, None], content['labels']
    yield path, images[:1437], labels[:1437]
    yield path, images[1437:], labels[1437:]


# name -> (generator of (path, images (N, C, H, W), labels (N,)) for train and test, number of classes, largest pixel)
DATASETS = {
    'MNIST': (_idx_splits('MNIST'), 10, 255),
    'FashionMNIST': (_idx_splits('FashionMNIST'), 10, 255),
    'SVHN': (_svhn_splits, 10, 255),
    'CIFAR10': (
        _cifar_splits('CIFAR10', 'cifar-10-binary.tar.gz', 'cifar-10-batches-bin', (_CIFAR10_BATCHES, ['test_batch.bin']), 1),
        10,
        255,
    ),
    'CIFAR100': (
        _cifar_splits('CIFAR100', 'cifar-100-binary.tar.gz', 'cifar-100-binary', (['train.bin'], ['test.bin']), 2),
        100,
        255,
    ),
    'digits': (_digits_splits, 10, 16),
}


def load_dataset(name, data_dir, normalize=False, device='cpu'):
    """A dataset, held on the device as one tensor per part.

    Args:
        name: an entry of DATASETS.
        data_dir: folder where its files are looked for, in the places where torchvision puts them too, else downloaded.
        normalize: False for pixels in [0, 1]; True to standardize them by the training set's mean and std per channel.
    Returns:
        Namespace of name, num_classes, input_shape (C, H, W), train_images (m, C, H, W) float32, train_labels (m,) int64,
        test_images and test_labels.
    Raises:
        BadInput: a file is missing and cannot be downloaded, or is damaged, mixed up, or has labels out of range.
    """
    splits, num_classes, largest = DATASETS[name]
    dataset = SimpleNamespace(name=name, num_classes=num_classes)
    for part, (path, images, labels) in zip(('train', 'test'), splits(data_dir)):
        if len(images) != len(labels):
            raise BadInput(f'{path}: {len(labels)} labels for {len(images)} {part} images; the files of two sets are mixed up')
        if len(images) == 0:
            raise BadInput(f'{path}: holds no {part} images')
        if labels.max() >= num_classes:
            raise BadInput(f'{path}: label {labels.max()} is out of range; {name} has the labels 0 to {num_classes - 1}')
        pixels = torch.from_numpy(images.copy()).to(device).float().div_(largest)
        setattr(dataset, f'{part}_images', pixels.contiguous(memory_format=torch.channels_last))
        setattr(dataset, f'{part}_labels', torch.from_numpy(labels.astype(np.int64)).to(device))
    dataset.input_shape = tuple(dataset.train_images.shape[1:])
    if normalize:
        std, mean = torch.std_mean(dataset.train_images.double(), dim=(0, 2, 3), correction=0, keepdim=True)
        std[std == 0] = 1  # a constant channel has nothing to scale
        for images in (dataset.train_images, dataset.test_images):
            images.sub_(mean).div_(std)
    return dataset


# ----------------------------------------------------------------------------------------------------------------------
# Measures of a network and of its training data
# ----------------------------------------------------------------------------------------------------------------------

# One weight layer seen as a convolution; a linear layer is one whose kernel covers the whole map. `taps` holds, for the
# vertical and the horizontal axis, the boolean array (kernel, outputs, inputs) that says which tap of which output
# position reads which input position; a tap that lies in the padding reads none.
Layer = namedtuple('Layer', 'name module shape stride padding dilation taps')

RELUS = (torch.relu, F.relu, 'relu', 'relu_')
FLATTENS = (torch.flatten, 'flatten')


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(module, name)


def trace_layers(net, input_shape):
    """The weight layers of a bias-free ReLU network, found by tracing one forward pass.

    Args:
        net: any nn.Module whose forward pass is a chain of (Conv2d, ReLU) or (Linear, ReLU), a flattening, and a last Linear.
        input_shape: (channels, height, width) of an image.
    Returns:
        A list of Layer, in the order of the forward pass.
    Raises:
        BadInput: the network has a bias, a skip connection or a module that the theory does not cover; it is named.
    """
    if len(input_shape) != 3:
        raise BadInput(f'input_shape = {tuple(input_shape)}: must be (channels, height, width)')
    try:
        graph = _Tracer().trace(net)
    except Exception as error:  # whatever the network's own code raises when it is run on symbols
        raise BadInput(f'{type(net).__name__}: its forward pass cannot be traced ({error})') from None
    (channels, *size), flat, layers, rectified = input_shape, False, [], True
    *nodes, output = graph.nodes
    if output.args != (nodes[-1],) or _has_hooks(net):
        raise BadInput(f"{type(net).__name__}: its output is not the last layer's, or it has forward hooks; neither is covered")
    for node, following in zip(nodes, (*nodes[1:], output)):
        module = net.get_submodule(node.target) if node.op == 'call_module' else None
        function = node.target if node.op in ('call_function', 'call_method') else None
        name = getattr(node.target, '__name__', node.target)
        what = f'{type(net).__name__}: {name}{f" ({type(module).__name__})" if module else ""}'
        if list(node.users) != [following] or following.all_input_nodes != [node]:
            raise BadInput(
                f'{what}: its output does not go to the next layer and there alone; skip connections are not covered'
            )
        if module and _has_hooks(module):
            raise BadInput(f'{what} has forward hooks, which can change what it computes; remove them')
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if getattr(module.forward, '__func__', None) not in (nn.Conv2d.forward, nn.Linear.forward):
                raise BadInput(f'{what} has a forward pass of its own, which is not covered')
            if module.bias is not None:
                raise BadInput(f'{what} has a bias; the theorems are about bias-free networks')
            if not rectified:
                raise BadInput(f'{what} follows a layer without a ReLU between them')
            rectified = False
        if isinstance(module, nn.Conv2d):
            if flat or module.groups != 1 or module.padding_mode != 'zeros' or isinstance(module.padding, str):
                raise BadInput(f'{what}: only ungrouped convolutions of maps, padded with a number of zeros, are covered')
            shape, stride, padding, dilation = module.weight.shape, module.stride, module.padding, module.dilation
        elif isinstance(module, nn.Linear):
            if not flat or module.in_features != channels * math.prod(size):
                raise BadInput(f'{what}: expected a linear layer on the flattened map of {channels * math.prod(size)} numbers')
            shape, stride, padding, dilation = (module.out_features, channels, *size), (1, 1), (0, 0), (1, 1)
        elif isinstance(module, nn.ReLU) or function in RELUS:
            if not layers:
                raise BadInput(f'{what} comes before the first layer; give the network rectified images instead')
            rectified = True
            continue
        elif isinstance(module, nn.Flatten) or function in FLATTENS:
            dims = (module.start_dim, module.end_dim) if module else _flatten_dims(*node.args, **node.kwargs)
            if dims not in ((1, -1), (1, 3)):
                raise BadInput(f'{what}: flattens other than the dimensions 1 to -1')
            flat = True
            continue
        elif node.op == 'placeholder' or isinstance(module, nn.Identity):
            continue
        else:
            raise BadInput(f'{what}: not covered; the theorems are about Conv2d, ReLU, Flatten and Linear')
        taps = [_taps(*axis) for axis in zip(size, shape[2:], stride, padding, dilation)]
        if shape[1] != channels or not all(axis.shape[1] for axis in taps):
            raise BadInput(f'{what}: does not fit its input of {channels} channels of {size[0]}x{size[1]}')
        if not all(axis.any() for axis in taps):
            raise BadInput(f'{what}: reads nothing but its padding')
        layers.append(Layer(node.target, module, tuple(shape), stride, padding, dilation, taps))
        channels, size = shape[0], [axis.shape[1] for axis in taps]
    if not layers or not isinstance(layers[-1].module, nn.Linear) or rectified:
        raise BadInput(f'{type(net).__name__}: its last layer is not a linear classifier')
    return layers


def _has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _flatten_dims(x, start_dim=0, end_dim=-1):
    return start_dim, end_dim


def _taps(size, kernel, stride, padding, dilation):
    """Which tap of which output position reads which input position along one axis: (kernel, outputs, inputs)."""
    outputs = max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    tap, out = np.ogrid[:kernel, :outputs]
    return (out * stride - padding + tap * dilation)[..., None] == np.arange(size)


def operator_norm(weight, in_size, stride=1, padding=0, dilation=1, tolerance=1e-5):
    """Spectral norm of the linear map x -> conv2d(x, weight) on zero-padded maps of its real size.

    Lanczos iteration on the convolution followed by its transpose, with full reorthogonalization: the same two
    convolutions a step as power iteration, and hundreds of times fewer steps where the largest singular values lie
    close together, as those of a convolution do. Starts from a fixed random vector, so the value depends on the weight
    alone. It ends when the residual of the largest Ritz value of A'A is below `tolerance` times that value: some squared
    singular value then lies within that, and after the first steps of a random start it is the largest.

    Args:
        weight: (out_channels, in_channels, kh, kw) float64, with entries far from overflow in squares.
        in_size: (height, width) of the input map.
    """
    shape = (1, weight.shape[1], *in_size)
    size = math.prod(shape)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight.device)
    vector /= vector.norm()
    basis = vector.new_empty(min(size, 64), size)
    alphas, betas = [], []
    for step in range(size):
        if step == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[step] = vector
        image = F.conv2d(vector.view(shape), weight, None, stride, padding, dilation)
        image = torch.nn.grad.conv2d_input(shape, weight, image, stride, padding, dilation).flatten()
        alphas.append(image @ vector)
        for _ in range(2):  # once is not enough
            image = image - (basis[: step + 1] @ image) @ basis[: step + 1]
        betas.append(image.norm())
        if step % 8 == 7 or step == size - 1 or betas[-1] <= 1e-12 * alphas[0]:
            off = torch.stack(betas)
            ritz = torch.diag(torch.stack(alphas)) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
            values, vectors = torch.linalg.eigh(ritz.cpu())
            largest, residual = values[-1].item(), off[-1].item() * abs(vectors[-1, -1].item())
            if (residual <= tolerance * largest and step >= 15) or betas[-1] <= 1e-12 * alphas[0]:
                break
        vector = image / betas[-1]
    return math.sqrt(max(largest, 0.0))


@np.errstate(over='ignore')
def product(*factors):
    """Product of nonnegative numbers and arrays, by their logarithms, so that no partial product over- or underflows.

    It is inf only if the product itself is too large for a float, and 0 only if a factor is, even beside an infinite one: a
    dead layer makes f zero.
    """
    factors = np.concatenate([np.ravel(factor) for factor in factors])
    return max(np.exp(np.log(factors).sum()), np.finfo(float).tiny) if factors.all() else 0.0


@torch.no_grad()
def measure_network(net, input_shape, margins=None):
    """Everything that the bounds ask of a network, on its input of the given shape.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
        margins: (m,) classification margins of the training samples; only the certificates ask for them.
    Returns:
        Namespace of arrays with an entry per weight layer l = 1..D, the classifier last:
            F    Frobenius norm of the weight tensor
            T    Frobenius norm of the layer's full linear map, its Toeplitz matrix
            s    operator norm of the same map
            a    sum over filters of the filter's l2 norm; classifier: F
            b    sum over filters and taps of the l2 norm over input channels
            deg  largest number of input positions that feed one output position
            p    output positions
            c    output channels
            W    number of weights
        and of r (largest l2 norm of a classifier row), rho = prod F, lip = prod s, D and margins.
    Raises:
        BadInput: the network is not covered, or its weights contain NaN or infinity.
    """
    table = {symbol: [] for symbol in ('F', 'T', 's', 'a', 'b', 'deg', 'p', 'c', 'W')}
    layers = trace_layers(net, input_shape)
    for layer in layers:
        weight = layer.module.weight.detach().double().view(layer.shape)
        scale = weight.abs().max().item()  # taken out, so that no square over- or underflows
        if not math.isfinite(scale):
            raise BadInput(f'{type(net).__name__}: the weights of {layer.name} contain NaN or infinity')
        weight = weight / (scale or 1.0)
        rows, columns = layer.taps
        counts = np.outer(rows.sum((1, 2)), columns.sum((1, 2)))  # output positions at which a tap reads the input
        tap_squares = weight.square().sum((0, 1)).cpu().numpy()
        filters = weight.flatten(1)
        if scale == 0:
            spectral = 0.0
        elif isinstance(layer.module, nn.Linear):
            gram = filters @ filters.T if len(filters) <= filters.shape[1] else filters.T @ filters
            spectral = math.sqrt(torch.linalg.eigvalsh(gram)[-1].item())
        else:
            in_size = (rows.shape[2], columns.shape[2])
            spectral = operator_norm(weight, in_size, layer.stride, layer.padding, layer.dilation)
        table['F'].append(scale * weight.norm().item())
        table['T'].append(scale * math.sqrt((tap_squares * counts).sum()))
        table['s'].append(scale * spectral)
        table['a'].append(scale * filters.norm(dim=1).sum().item())
        table['b'].append(scale * weight.norm(dim=1).sum().item())
        table['deg'].append(rows.sum((0, 2)).max() * columns.sum((0, 2)).max())
        table['p'].append(rows.shape[1] * columns.shape[1])
        table['c'].append(layer.shape[0])
        table['W'].append(weight.numel())
    network = SimpleNamespace(**{symbol: np.array(values, dtype=float) for symbol, values in table.items()})
    network.a[-1] = network.F[-1]
    network.r = scale * filters.norm(dim=1).max().item()
    network.rho, network.lip, network.D = product(network.F), product(network.s), len(layers)
    network.margins = margins
    return network


@torch.no_grad()
def measure_data(net, images):
    """Everything that the bounds ask of the training data; it needs the network for its geometry alone.

    Args:
        net: a network as `trace_layers` takes it.
        images: (m, C, H, W), exactly as the network sees them.
    Returns:
        Namespace of
            m            number of samples
            E_max        max over input positions j of sum_i ||x_i[:, j]||^2, the norm over channels
            E_tot        sum_i ||x_i||^2
            P            per layer, the largest l2 norm of the part of an image that one patch of the layer sees, its
                         receptive field; the whole image for the classifier
            norm_ratio   sqrt(E_tot / E_max)
            input_shape  (C, H, W)
    """
    reach = [np.eye(size) for size in images.shape[2:]]
    fields = []  # per hidden layer and axis, (outputs, pixels): does this output position see this pixel?
    for layer in trace_layers(net, tuple(images.shape[1:]))[:-1]:
        reach = [(taps.any(0) @ seen > 0).astype(float) for taps, seen in zip(layer.taps, reach)]
        fields.append([torch.from_numpy(axis).to(images.device) for axis in reach])
    energy, largest = 0.0, torch.zeros(len(fields) + 1, dtype=torch.float64, device=images.device)
    for chunk in images.split(2048):
        squares = chunk.double().square().sum(1)
        energy = energy + squares.sum(0)
        seen = [(rows @ squares @ columns.T).max() for rows, columns in fields] + [squares.sum((1, 2)).max()]
        largest = torch.maximum(largest, torch.stack(seen))
    E_max, E_tot = energy.max().item(), energy.sum().item()
    return SimpleNamespace(
        m=len(images),
        E_max=E_max,
        E_tot=E_tot,
        P=largest.sqrt().cpu().numpy(),
        norm_ratio=math.sqrt(E_tot / E_max) if E_max else 0.0,
        input_shape=tuple(images.shape[1:]),
    )


def classification_margins(outputs, labels):
    """f(x_i)_{y_i} - max_{j != y_i} f(x_i)_j of each sample, (m,) float64, of outputs (m, C) and labels (m,)."""
    outputs = outputs.double()
    own = outputs.gather(1, labels[:, None])
    return own[:, 0] - outputs.scatter(1, labels[:, None], -math.inf).amax(1)


def margin_error(margins, gamma):
    """err_S^gamma, the fraction of margins of at most gamma; err_S^0 is the 0-1 error, ties counting as errors."""
    return (~(margins > gamma)).double().mean().item()  # NaN is an error too


# ----------------------------------------------------------------------------------------------------------------------
# Bounds on err_P(f) - err_S^gamma(f). Each is a function of the two tables, delta and gamma. The words before the first
# colon of its docstring name it in the figure; where it is logged and plotted follows from its entry in BOUNDS.
# ----------------------------------------------------------------------------------------------------------------------


def tail(norm, m, delta):
    """The confidence term after a union over integer values of the norm."""
    return 3 * np.sqrt((np.log(2 / delta) + 2 * np.log(norm + 2)) / (2 * m))


def our_bound(network, data, delta, gamma):
    """Ours (Galanti et al. 2023): main theorem of "Norm-based Generalization Bounds for Sparse Neural Networks" (NeurIPS 2023).

    As the paper's Figure 1 evaluates it; rho is the product of the Frobenius norms of the weight tensors.
    """
    log_paths = network.D * np.log(2) + np.log(network.deg[:-1]).sum() + np.log(network.c[-1])
    energy = np.sqrt(product(network.deg[:-1], data.E_max))
    complexity = (1 + np.sqrt(2 * log_paths)) * energy / data.m
    return product(2 * np.sqrt(2) * (network.rho + 1) / gamma, complexity) + tail(network.rho, data.m, delta)


def golowich_bound(network, data, delta, gamma):
    """Golowich et al. 2018: Theorem 1 of "Size-Independent Sample Complexity of Neural Networks" (COLT 2018).

    Applied to the layers' Toeplitz matrices, and carried to C classes and margins in the way of `our_bound`.
    """
    rho = product(network.T)
    log_paths = network.D * np.log(2) + np.log(network.c[-1])
    complexity = (1 + np.sqrt(2 * log_paths)) * np.sqrt(data.E_tot) / data.m
    return product(2 * np.sqrt(2) * (rho + 1) / gamma, complexity) + tail(rho, data.m, delta)


def ledent_bound(network, data, delta, gamma):
    """Ledent et al. 2021: Section E of "Norm-based Generalisation Bounds for Deep Multi-class CNNs" (AAAI 2021).

    The form with fixed Lipschitz constraints, as Graf et al. 2022 evaluate it, distances taken from zero. The theorem's
    largest patch norm of a layer's input is bounded by that of the patch's receptive field times the operator norms
    before it.
    """
    D, m = network.D, data.m
    q = [
        product(data.P[l] / gamma, np.delete(network.s[:-1], l), network.r, network.a[l], np.sqrt(network.p[l]))
        for l in range(D - 1)
    ]
    q = np.array([*q, product(data.P[-1] / gamma, network.s[:-1], network.F[-1])])
    units = network.p * network.c
    Q = (q ** (2 / 3)).sum() ** (3 / 2)
    Gamma, Wbar = (q * units).max(), units.max()
    R = 4 / m + product(768 * Q / np.sqrt(m), np.sqrt(np.log2(32 * Gamma * m**2 + 7 * Wbar * m)), np.log(m))
    return 2 * R + 3 * np.sqrt(np.log(2 / delta) / (2 * m))


def graf_bound(network, data, delta, gamma):
    """Graf et al. 2022: Theorem 3.5, first bound, of "On Measuring Excess Capacity in Neural Networks" (NeurIPS 2022).

    Distances taken from zero, no union over norms.
    """
    m = data.m
    C = np.array(
        [product(4 / gamma * np.sqrt(data.E_tot / m), np.delete(network.s, l), network.b[l]) for l in range(network.D)]
    )
    H = (1 / np.arange(1, m)).sum()
    covering = np.sqrt(np.log(2 * network.W.max())) * np.ceil(C ** (2 / 3)).sum() ** (3 / 2)
    R = 4 / m + product(12 * H / np.sqrt(m), covering)
    return 2 * R + 3 * np.sqrt(np.log(2 / delta) / (2 * m))


def sedghi_bound(network, data, delta, gamma):
    """Long and Sedghi 2020: Theorem 2.1 of "Generalization Bounds for Deep Convolutional Neural Networks" (ICLR 2020).

    Its unspecified constant is set to 1, so it is a complexity measure, comparable in shape and not in level. Distances
    are taken from zero after the layers are rescaled to equal operator norms, which leaves the function unchanged. The
    theorem is about a loss that is Lipschitz in the outputs, and gamma does not enter.
    """
    beta = network.D * product(network.s ** (1 / network.D))
    return beta * np.sqrt(network.W.sum() / data.m) + np.sqrt(np.log(1 / delta) / data.m)


def corrected_bound(network, data, delta, gamma):
    """Corrected bound: `our_bound` with the classifier's own fan-in and its number of classes in it.

    Derived here, see README: the classifier is peeled in the group norm N21, the sum of the l2 norms over channels of
    its rows cut into positions, which is `b` of the last layer.
    """
    rho = product(network.b[-1], network.F[:-1])
    log_paths = np.log(network.c[-1]) + (network.D - 1) * np.log(2) + np.log(network.deg).sum()
    energy = np.sqrt(product(network.deg[:-1], data.E_max))
    complexity = (1 + np.sqrt(2 * log_paths)) * energy / data.m
    return product(4 * (rho + 1) / gamma, complexity) + tail(rho, data.m, delta)


MARGINS = 2.0 ** np.arange(-4, 2.5, 0.5)  # the fixed grid of margins over which the certificate takes its union


def _certificates(network, data, delta):
    """err_S^gamma + corrected_bound at confidence delta / |MARGINS|, for each gamma of MARGINS."""
    delta = delta / len(MARGINS)
    return [margin_error(network.margins, g) + corrected_bound(network, data, delta, g) for g in MARGINS]


def certified_error(network, data, delta, gamma):
    """Certified error: an upper bound on the expected 0-1 error itself, with probability 1 - delta.

    The least certificate over the grid MARGINS, so gamma does not enter. 1 means that it says nothing.
    """
    return min(1.0, *_certificates(network, data, delta))


def certified_margin(network, data, delta, gamma):
    """Certified margin: the gamma of MARGINS at which the certificate is least."""
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
}


def evaluate_bounds(net, data, margins, delta=0.001, gamma=1.0):
    """Every bound of BOUNDS on a trained network.

    Args:
        net: a network as `trace_layers` takes it.
        data: table of `measure_data(net, images)`.
        margins: `classification_margins(net(images), labels)` of the training samples.
        delta: the bounds hold with probability at least 1 - delta.
        gamma: margin.
    Returns:
        {column: float} with rho = prod F, prod_ratio = prod s / F (0 for a dead layer), norm_ratio, and each bound, which
        is inf where it is too large for a float.
    Raises:
        BadInput: the network is not covered by the theorems, its weights contain NaN, or the margins are of another set.
    """
    if len(margins) != data.m:
        raise BadInput(f'{len(margins)} margins for {data.m} training samples; take both from the same set')
    network = measure_network(net, data.input_shape, margins)
    with np.errstate(over='ignore', under='ignore'):
        ratios = network.s / np.where(network.F == 0, 1, network.F)
        row = {'rho': network.rho, 'prod_ratio': ratios.prod(), 'norm_ratio': data.norm_ratio}
        row |= {column: bound(network, data, delta, gamma) for column, bound in BOUNDS.items()}
    return {column: float(value) for column, value in row.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Result folders
# ----------------------------------------------------------------------------------------------------------------------

COLUMNS = (
    'epoch, lr, train_loss, test_loss, train_error, test_error, generalization_gap, train_margin_error, rho, prod_ratio, '
    f'norm_ratio, {", ".join(BOUNDS)}, train_seconds, eval_seconds'
).split(', ')
CHECKPOINT_FORMAT = 1


def new_results_folder(results_dir):
    """Makes and returns the next numbered folder in results_dir; launches at the same moment get different ones."""
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    number = max((int(entry.name) for entry in results_dir.iterdir() if entry.name.isdecimal()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            (results_dir / str(number)).mkdir()
            return results_dir / str(number)


def write_file(path, content):
    """Writes bytes to a temporary file and moves it into place, so that a kill at any moment leaves the old or the new."""
    temporary = Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(path, wait):
    """Holds a lock that ends with the process however it ends. Yields whether it was got; `wait` waits for it."""
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


def save_checkpoint(path, checkpoint):
    """Saves a dictionary of tensors and plain values. Raises OSError where the disk does not take it."""
    buffer = io.BytesIO()
    torch.save(checkpoint | {'format': CHECKPOINT_FORMAT}, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path, device):
    """The dictionary that `save_checkpoint` wrote, tensors on the device. Raises BadInput where it is damaged or newer."""
    mend = 'move it away to train this network anew'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a file that is no checkpoint; the refusal says so
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except PermissionError:
        raise BadInput(f'{path}: no permission to read it') from None
    except Exception:  # torch raises whatever a damaged or a hostile file leads it to
        raise BadInput(f'{path}: not a checkpoint, or a damaged one; {mend}') from None
    found = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if found != CHECKPOINT_FORMAT:
        raise BadInput(f'{path}: has checkpoint format {found}, this program reads {CHECKPOINT_FORMAT}; {mend}')
    return checkpoint


def metrics_line(row):
    """A row, {column: value}, as a line of metrics.csv; floats read back exactly."""
    return ','.join(repr(row[column]) for column in COLUMNS) + '\n'


def read_metrics(path):
    """metrics.csv as {column: float array}; the unfinished last line of a run that is being written is left out."""
    try:
        text = Path(path).read_text()
        rows = list(csv.DictReader(text[: text.rfind('\n') + 1].splitlines()))
        table = {column: np.array([float(row[column]) for row in rows]) for column in (rows[0] if rows else COLUMNS)}
        if not {'epoch', 'train_error', 'test_error', 'generalization_gap'} <= set(table):
            raise ValueError
    except (TypeError, ValueError):
        raise BadInput(f'{path}: not a table of metrics; --resume writes it again from the checkpoint') from None
    return table


def plot_figure(folder, names):
    """Draws figure.png of a results folder after the paper's Figure 1: a panel per network that has metrics, log2 axis.

    Args:
        folder: results folder.
        names: the runs' folders in it, in the order of the panels.
    Returns:
        The path of the figure, or None where nothing is logged yet.
    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib.figure  # the object interface alone: no display and no global state

    folder = Path(folder)
    with locked(folder / '.figure.lock', wait=True):  # whoever draws last has read last
        logged = {name: path for name in names if (path := folder / name / 'metrics.csv').exists()}
        tables = {name: read_metrics(path) for name, path in logged.items()}
        tables = {name: table for name, table in tables.items() if len(table['epoch'])}
        if not tables:
            return None
        columns = len(tables) if len(tables) <= 3 else math.ceil(math.sqrt(len(tables)))
        rows = -(-len(tables) // columns)
        figure = matplotlib.figure.Figure(figsize=(4.2 * columns + 2.6, 3.6 * rows), layout='constrained')
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for panel, (name, table) in zip(panels, tables.items()):
            _plot_panel(panel, name, table)
        for panel in panels[len(tables) :]:
            panel.remove()
        for row in range(rows):
            panels[row * columns].set_ylabel('value')
        curves = sorted(panels[0].get_lines(), key=lambda line: -np.nan_to_num(line.get_ydata()[-1]))  # as they end
        figure.legend(handles=curves, loc='outside right center', frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=130)
        write_file(folder / 'figure.png', buffer.getbuffer())
    return folder / 'figure.png'


def _plot_panel(panel, name, table):
    def draw(values, label, **style):
        shown = np.where((values > 0) & np.isfinite(values), values, np.nan)  # neither 0 nor inf has a place on a log axis
        panel.plot(table['epoch'], shown, label=label, marker='.' if len(values) < 3 else None, **style)

    for index, (column, bound) in enumerate(BOUNDS.items()):
        if column.endswith('_bound') and column in table:
            draw(table[column], bound.__doc__.partition(':')[0], color=f'C{index}')
    draw(table['train_error'], 'Train error', color='black')
    draw(table['test_error'], 'Test error', color='C9', linestyle='--')
    if 'certified_error' in table:
        draw(table['certified_error'], 'Certified error', color='C6', linestyle='--')
    draw(np.abs(table['generalization_gap']), 'Generalization gap (absolute)', color='gray', linestyle=':')
    panel.set_yscale('log', base=2)
    panel.yaxis.get_major_locator().set_params(base=2**5)  # ticks at 2^0 and every fifth power from there
    panel.set_title(name)
    panel.set_xlabel('epoch')
    panel.grid(alpha=0.3)

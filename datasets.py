"""Datasets: readers of their real formats, downloads, and `load_dataset`, which holds one on the device as a tensor per part.

`load_dataset` also draws training subsets and makes labels wrong; `crops` augments a batch; `fingerprint` tells two
datasets apart.
"""

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import struct
import tarfile
import urllib.request
import uuid
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from conf import BadInput

MAX_BYTES = (
    2**29
)  # no file of these datasets holds more; a damaged one cannot ask for more memory than this
PADDING = 4  # of `crops`
_SHIFTS = 2 * PADDING + 1  # along either axis
VARIANTS = 2 * _SHIFTS**2  # of an image

_CIFAR10_BATCHES = [f'data_batch_{i}.bin' for i in range(1, 6)]

# dataset -> where its files are downloaded from, and {file: its MD5}
DOWNLOADS = {
    'MNIST': (
        'https://ossci-datasets.s3.amazonaws.com/mnist',
        {
            'train-images-idx3-ubyte.gz': 'f68b3c2dcbeaaa9fbdd348bbdeb94873',
            'train-labels-idx1-ubyte.gz': 'd53e105ee54ea40749a09fcbcd1e9432',
            't10k-images-idx3-ubyte.gz': '9fb629c4189551a2d022fa330f9573f3',
            't10k-labels-idx1-ubyte.gz': 'ec29112dd5afa0611ce80d1b7f02629c',
        },
    ),
    'FashionMNIST': (
        'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com',
        {
            'train-images-idx3-ubyte.gz': '8d4fb7e6c68d591d4c3dfef9ec88bf0d',
            'train-labels-idx1-ubyte.gz': '25c81989df183df01b3e8a0aad5dffbe',
            't10k-images-idx3-ubyte.gz': 'bef4ecab320f06d8554ea6380940ec79',
            't10k-labels-idx1-ubyte.gz': 'bb300cfdad3c16e7a12a480ee83cd310',
        },
    ),
    'CIFAR10': (
        'https://www.cs.toronto.edu/~kriz',
        {'cifar-10-binary.tar.gz': 'c32a1d4ab5d03f1284b67883e8d87530'},
    ),
    'CIFAR100': (
        'https://www.cs.toronto.edu/~kriz',
        {'cifar-100-binary.tar.gz': '03b5dce01913d631647c71ecec9e9cb8'},
    ),
    'SVHN': (
        'http://ufldl.stanford.edu/housenumbers',
        {
            'train_32x32.mat': 'e26dedcc434d2e4c54c9b2d4a06d8373',
            'test_32x32.mat': 'eb5a983be6a315427106f1b164d9cef3',
        },
    ),
}


def _demand(holds, complaint):
    if not holds:
        raise BadInput(complaint)


def _refuse_special(path):
    """Refuses a FIFO, a socket or a device, whose reading could wait for ever."""
    regular = not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path)
    _demand(regular, f'{Path(path).name} is not a regular file')


@contextlib.contextmanager
def _readable(path):
    """Turns whatever a damaged file makes a reader raise into a BadInput that names the file and the mend."""
    try:
        _refuse_special(path)
        yield
    except BadInput as error:
        raise BadInput(f'{path}: {error}; delete the file to download it again') from None
    except PermissionError:
        raise BadInput(f'{path}: no permission to read it') from None
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        zlib.error,
        struct.error,
        tarfile.TarError,
    ) as error:
        raise BadInput(
            f'{path}: damaged or truncated ({error}); delete the file to download it again'
        ) from None


def read_idx(path, item_shape):
    """The uint8 array (N, *item_shape) of an IDX file, gzip-compressed where its name ends in .gz.

    Raises:
        BadInput: not an IDX file of such items, truncated, damaged, or with bytes after its end.
    """
    with _readable(path), (gzip.open if Path(path).suffix == '.gz' else open)(path, 'rb') as file:
        dims = 1 + len(item_shape)
        right = 0x800 + dims
        magic, count, *shape = struct.unpack(f'>{1 + dims}I', file.read(4 + 4 * dims))
        _demand(
            magic == right,
            f'its first bytes are {magic:#010x} where an IDX file of {dims} dimensions has {right:#010x}',
        )
        _demand(
            tuple(shape) == tuple(item_shape),
            f'holds items of shape {tuple(shape)}, not {tuple(item_shape)}',
        )
        size = count * math.prod(item_shape)
        _demand(size <= MAX_BYTES, f'declares {count} items, more than any of these datasets has')
        data = file.read(size + 1)  # one byte more, to see the end of the file
        _demand(len(data) <= size, f'holds more bytes than the {size} that it declares')
        _demand(len(data) == size, f'holds fewer bytes than the {size} that it declares')
    return np.frombuffer(data, np.uint8).reshape(count, *item_shape)


def _unpacked(folder, members):
    """{member: bytes} of the files of a folder."""
    found = {}
    for member in members:
        _refuse_special(Path(folder, member))
        with open(Path(folder, member), 'rb') as file:
            found[member] = file.read(MAX_BYTES + 1)
    return found


def _packed(archive, folder, members):
    """{member: bytes} of those that a .tar.gz has in `folder`.

    It is read in one pass and by exact name, never unpacked, so that neither links nor `..` matter.
    """
    wanted, found, total = {f'{folder}/{member}': member for member in members}, {}, 0
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode='r|') as tar:
        for entry in tar:
            total += entry.size
            _demand(total <= MAX_BYTES, 'unpacks to more than this dataset has')
            if entry.isreg() and (name := os.path.normpath(entry.name)) in wanted:
                found[wanted[name]] = tar.extractfile(entry).read()
        rest = stream.read(2**20)  # to the end, where gzip checks its checksum
        _demand(len(rest) < 2**20, 'goes on after its last member')
    return found


def read_cifar(archive, folder, members, label_bytes):
    """Images (N, 3, 32, 32) and labels (N,), uint8, of the binary CIFAR batches `members`.

    Args:
        archive: path of cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, or of the folder it unpacks to.
        folder: the batches' folder inside the archive.
        label_bytes: bytes before an image's pixels; the last of them is its label.
    Raises:
        BadInput: a batch is missing, truncated or not a whole number of records.
    """
    record = label_bytes + 3 * 32 * 32
    with _readable(archive):
        found = (
            _unpacked(archive, members)
            if Path(archive).is_dir()
            else _packed(archive, folder, members)
        )
        for member in members:
            _demand(member in found, f'has no {folder}/{member}')
            size = len(found[member])
            whole = 0 < size <= MAX_BYTES and size % record == 0
            _demand(whole, f'{member} is not a whole number of records of {record} bytes')
        records = np.frombuffer(b''.join(found[member] for member in members), np.uint8).reshape(
            -1, record
        )
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


def read_svhn(path):
    """Images (N, 3, 32, 32) and labels (N,), uint8, of an SVHN .mat file, where the label 10 means the digit 0."""
    try:
        import scipy.io
    except ImportError:
        raise BadInput(
            'dataset_name = SVHN: its .mat files are read by scipy; pip install scipy'
        ) from None
    with _readable(path):
        try:
            shapes = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(str(path))}
            (*size, count), kind = shapes['X']
            right = (
                kind == 'uint8'
                and size == [32, 32, 3]
                and shapes['y'][0] == (count, 1)
                and count * 3072 <= MAX_BYTES
            )
            _demand(right, 'X and y are not 32x32 colour images and their labels')
            content = scipy.io.loadmat(str(path), variable_names=['X', 'y'])
        except (BadInput, OSError):
            raise
        except Exception as error:  # scipy's reader raises whatever a damaged field leads it to
            raise ValueError(f'{type(error).__name__}: {error}') from None
        labels = content['y'][:, 0]
        _demand(np.isin(labels, range(1, 11)).all(), 'has labels out of range 1 to 10')
    return content['X'].transpose(3, 2, 0, 1), (labels % 10).astype(np.uint8)


def _locate(dataset, data_dir, folders, names, file):
    """The first of `names` that exists in one of data_dir's `folders`; else `file`, downloaded to the first folder."""
    for folder in folders:
        for name in names:
            if (path := Path(data_dir, folder, name)).exists():
                return path
    (host, md5s), path = DOWNLOADS[dataset], Path(data_dir, folders[0], file)
    try:
        download(f'{host}/{file}', md5s[file], path)
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
        found = digest.hexdigest()
        _demand(
            found == md5,
            f'{url}: the download has MD5 {found}, not {md5}; try again or fetch it by hand',
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _idx_splits(dataset):
    def read(data_dir):
        for split in ('train', 't10k'):
            arrays = []
            for kind, item_shape in (('images-idx3', (28, 28)), ('labels-idx1', ())):
                file = f'{split}-{kind}-ubyte'
                path = _locate(
                    dataset,
                    data_dir,
                    (f'{dataset}/raw', dataset),
                    (file, f'{file}.gz'),
                    f'{file}.gz',
                )
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
        path = _locate(
            'SVHN', data_dir, ('', 'SVHN'), (f'{split}_32x32.mat',), f'{split}_32x32.mat'
        )
        yield path, *read_svhn(path)


def _digits_splits(data_dir):
    path = (
        Path(__file__).resolve().parent / 'data' / 'digits.npz'
    )  # ships with the project, whatever data_dir says
    with _readable(path):
        content = np.load(path)
        images, labels = content['images'][:, None], content['labels']
    yield path, images[:1437], labels[:1437]
    yield path, images[1437:], labels[1437:]


_CIFAR10 = (
    'CIFAR10',
    'cifar-10-binary.tar.gz',
    'cifar-10-batches-bin',
    (_CIFAR10_BATCHES, ['test_batch.bin']),
    1,
)
_CIFAR100 = (
    'CIFAR100',
    'cifar-100-binary.tar.gz',
    'cifar-100-binary',
    (['train.bin'], ['test.bin']),
    2,
)

# name -> (generator of (path, images (N, C, H, W), labels (N,)) for train and test, shape of an image, classes, largest pixel)
DATASETS = {
    'MNIST': (_idx_splits('MNIST'), (1, 28, 28), 10, 255),
    'FashionMNIST': (_idx_splits('FashionMNIST'), (1, 28, 28), 10, 255),
    'SVHN': (_svhn_splits, (3, 32, 32), 10, 255),
    'CIFAR10': (_cifar_splits(*_CIFAR10), (3, 32, 32), 10, 255),
    'CIFAR100': (_cifar_splits(*_CIFAR100), (3, 32, 32), 100, 255),
    'digits': (_digits_splits, (1, 8, 8), 10, 16),
}


def load_dataset(
    name,
    data_dir,
    normalize=False,
    device='cpu',
    train_samples=0,
    label_noise=0.0,
    clean_samples=0,
    data_seed=0,
):
    """A dataset, held on the device as one tensor per part.

    Args:
        name: an entry of DATASETS.
        data_dir: folder where its files are looked for, in the places where torchvision puts them too, else downloaded.
        normalize: False for pixels in [0, 1]; True to standardize them by mean and std per channel of the whole training
            set, so that an image is the same input in every subset.
        train_samples: train on the first so many of a permutation of the training set: subsets are nested, each an
            i.i.d. sample; 0 is all of it, in the file's order.
        label_noise: share p of the training labels that is made wrong: exactly round(p n) of the n labels behind the clean
            ones, each replaced by a class drawn from the others. A larger share keeps the wrong labels of a smaller one.
        clean_samples: so many first training samples keep their labels.
        data_seed: of the permutation and of the wrong labels, which depend on nothing else that is random.
    Returns:
        Namespace of name, num_classes, input_shape (C, H, W), train_images (m, C, H, W) float32, train_labels (m,) int64,
        test_images and test_labels. Test labels are never made wrong.
    Raises:
        BadInput: a file is missing and cannot be downloaded, or is damaged, mixed up, or has labels out of range; what a reader
            yields is not what DATASETS declares; or more samples are asked for than there are.
    """
    splits, shape, num_classes, largest = DATASETS[name]
    _demand(
        num_classes > 1, f'{name}: DATASETS declares {num_classes} class; a margin wants at least 2'
    )
    parts = []
    for part, (path, images, labels) in zip(('train', 'test'), splits(data_dir)):
        mixed_up = f'{path}: {len(labels)} labels for {len(images)} {part} images; the files of two sets are mixed up'
        _demand(len(images) == len(labels), mixed_up)
        _demand(len(images) > 0, f'{path}: holds no {part} images')
        found = tuple(images.shape[1:])
        _demand(
            found == shape,
            f'{path}: {part} images of shape {found}; DATASETS declares {shape} for {name}',
        )
        top = images.max()  # nan where one is
        _demand(
            top <= largest,
            f'{path}: a pixel of {top} in a {part} image; DATASETS declares {largest} as the largest',
        )
        whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
        _demand(
            whole,
            f'{path}: {part} labels of {labels.dtype} and shape {labels.shape}; they must be integers, one an image',
        )
        for label in (labels.min(), labels.max()):
            right = 0 <= label < num_classes
            _demand(
                right,
                f'{path}: label {label} is out of range; {name} has the labels 0 to {num_classes - 1}',
            )
        parts.append((images, labels.astype(np.int64)))
    _demand(
        len(parts) == 2,
        f'{name}: its reader yields {len(parts)} of the two parts, training and test, that it must yield',
    )
    if normalize:
        counted = np.issubdtype(parts[0][0].dtype, np.integer) and parts[0][0].min() >= 0
        _demand(
            counted,
            f'normalize = True: the pixels of {name} are no integers from 0 to {largest}; set it to False',
        )
        mean, std = _mean_and_std(parts[0][0], largest)
    parts[0] = _draw(*parts[0], num_classes, train_samples, label_noise, clean_samples, data_seed)

    dataset = SimpleNamespace(name=name, num_classes=num_classes)
    for part, (images, labels) in zip(('train', 'test'), parts):
        # All on the CPU: another device could round differently, and a resume on it would find other data.
        pixels = (
            torch.from_numpy(images.astype(images.dtype.newbyteorder('='))).float().div_(largest)
        )
        if normalize:
            pixels.sub_(mean).div_(std)
        setattr(
            dataset,
            f'{part}_images',
            pixels.contiguous(memory_format=torch.channels_last).to(device),
        )
        setattr(dataset, f'{part}_labels', torch.from_numpy(labels).to(device))
    dataset.input_shape = tuple(dataset.train_images.shape[1:])
    return dataset


def _mean_and_std(images, largest):
    """Mean and std per channel, (1, C, 1, 1), of the pixels of uint8 images over `largest`.

    Taken from the counts of each value, so that they do not depend on the order of a sum and thus on the number of threads.
    """
    counts = np.stack(
        [np.bincount(channel.ravel(), minlength=largest + 1) for channel in images.swapaxes(0, 1)]
    )
    shares = counts / counts.sum(1, keepdims=True)
    values = np.arange(counts.shape[1], dtype=np.float32) / np.float32(
        largest
    )  # as the images hold them
    mean = shares @ values.astype(float)
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a constant channel has nothing to scale
    return [torch.from_numpy(entry)[None, :, None, None] for entry in (mean, std)]


def _draw(images, labels, num_classes, train_samples, label_noise, clean_samples, data_seed):
    """The training samples that the settings ask for, some labels made wrong; see `load_dataset`."""
    m = len(images)
    _demand(
        train_samples <= m,
        f'train_samples = {train_samples}: the training set holds {m}; ask for fewer, or 0 for all',
    )
    choice, noise = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence(data_seed).spawn(2)
    )
    if train_samples:
        first = choice.permutation(len(images))[:train_samples]
        images, labels = images[first], labels[first]
    m = len(labels)
    _demand(
        clean_samples <= m,
        f'clean_samples = {clean_samples}: there are {m} training samples; keep at most so many clean',
    )
    _demand(0 <= label_noise <= 1, f'label_noise = {label_noise}: must be a share from 0 to 1')
    others = m - clean_samples
    wrong = noise.permutation(others)[: round(label_noise * others)]
    steps = noise.integers(
        1, num_classes, others
    )  # drawn for all, so that a larger share only adds wrong labels
    labels[clean_samples + wrong] = (labels[clean_samples + wrong] + steps[wrong]) % num_classes
    return images, labels


def crops(images, variants):
    """A crop of each image, as large as it, out of the image with PADDING zeros on every side; mirrored or not.

    Zero is black; of a dataset that is normalized it is the training set's mean.

    Args:
        images: (B, C, H, W).
        variants: (B,) integers from 0 to below VARIANTS, each a shift, mirrored where odd.
    Returns:
        (B, C, H, W), in memory as channels_last; nothing waits for the device, as a CUDA graph asks for.
    """
    height, width = images.shape[2:]
    shift, mirrored = variants[:, None] // 2, variants[:, None] % 2
    rows = torch.arange(height, device=images.device) + shift // _SHIFTS
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored == 1, columns.flip(0), columns) + shift % _SHIFTS
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return F.pad(images, [PADDING] * 4)[each, :, rows[:, :, None], columns[:, None]].movedim(3, 1)


def fingerprint(dataset):
    """A hash, as 32 hexadecimal digits, of the images and labels that a network is trained and tested on."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (
        dataset.train_images,
        dataset.train_labels,
        dataset.test_images,
        dataset.test_labels,
    ):
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        for chunk in tensor.split(4096):
            digest.update(chunk.cpu().contiguous().numpy())
    return digest.hexdigest()

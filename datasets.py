"""Datasets: readers of their files, downloads, and `load_dataset`, which holds one as tensors.

`load_dataset` also draws training subsets and wrong labels; `crops` augments a batch; `fingerprint`
tells two datasets apart.
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import os
import shutil
import struct
import tarfile
import urllib.request
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from conf import ROOT, BadInput, closest

PADDING = 4  # pixels of zeros on each side of an image that `crops` cuts from
SHIFTS = 2 * PADDING + 1  # positions of a crop along either axis
VARIANTS = 2 * SHIFTS**2  # crops of an image, each of them also mirrored

# dataset -> host of its files, and {file: MD5}
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


def find_file(dataset, folders, file, unpacked=None):
    """The path of a file, or of its unpacked form, in one of the folders.

    Where there is neither, the file is downloaded to the first of the folders.
    """
    for folder in folders:
        for name in (unpacked or file, file):
            path = Path(folder, name)
            if path.exists():
                return path
    return download(dataset, file, Path(folders[0]))


def download(dataset, file, folder):
    """Downloads a file of a dataset to a folder and returns its path.

    Raises:
        BadInput: the download failed, or the file's MD5 is not the one of DOWNLOADS.
    """
    host, md5s = DOWNLOADS[dataset]
    url = f'{host}/{file}'
    path = folder / file
    # Files in other formats, such as torchvision's cifar-10-batches-py, have similar names.
    similar = sorted(found.name for found in folder.glob(f'{file[:8]}*'))
    missing = f'{dataset}: {file} is not in {folder}'
    if similar:
        missing += f' (which has {", ".join(similar[:5])})'
    print(f'{missing}: downloading it', flush=True)
    # The file gets its name once it is whole, so that an interrupted download is not taken for it.
    part = folder / f'{file}.{uuid.uuid4().hex}.tmp'
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            folder.mkdir(parents=True, exist_ok=True)
            size = int(response.headers.get('Content-Length', 0))
            with tqdm.wrapattr(response, 'read', total=size, desc=file) as source:
                with open(part, 'wb') as target:
                    shutil.copyfileobj(source, target)
        md5 = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
        if md5 != md5s[file]:
            raise BadInput(
                f'{url}: has MD5 {md5}, not {md5s[file]}; try again, or fetch it by hand'
            )
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise BadInput(
            f'{missing} and could not be downloaded ({error}); put it there, '
            'or try python train.py --settings conf/digits.py, whose data ship with the program'
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def reading(path):
    """Turns whatever reading a damaged file raises into a BadInput that names the file."""
    try:
        yield
    except Exception as error:  # gzip, zlib, tarfile and scipy raise many kinds
        raise BadInput(
            f'{path}: could not be read ({error}); if it is damaged, delete it to download it again'
        ) from None


def read_idx(path, item_shape):
    """The uint8 array (N, *item_shape) of an IDX file, gzip-compressed where its name ends in .gz.

    Raises:
        BadInput: not an IDX file of such items, truncated, damaged, or with bytes after its end.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(
            f'{path}: is a folder where a file is wanted; replace it by the file in it, '
            f'or delete it to read or download {path.name}.gz'
        )
    dims = 1 + len(item_shape)
    with reading(path):
        data = path.read_bytes()
        if path.suffix == '.gz':
            data = gzip.decompress(data)
        # Big-endian 32-bit header: 0x08 (bytes) and the number of dimensions, then their sizes.
        magic, *shape = struct.unpack_from(f'>{1 + dims}I', data)
        if magic != 0x800 + dims or tuple(shape[1:]) != item_shape:
            raise ValueError(f'it is not an IDX file of uint8 items of shape {item_shape}')
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_mnist(dataset, data_dir):
    """Yields the images and labels of the training and test set from their four IDX files."""
    folders = Path(data_dir, dataset, 'raw'), Path(data_dir, dataset)
    for split in ('train', 't10k'):
        arrays = []
        for kind, item_shape in (('images-idx3', (28, 28)), ('labels-idx1', ())):
            name = f'{split}-{kind}-ubyte'
            path = find_file(dataset, folders, f'{name}.gz', name)
            arrays.append(read_idx(path, item_shape))
        images, labels = arrays
        yield images[:, None], labels


def read_archive(path):
    """{name: bytes} of the files of a .tar.gz archive, whatever their folder, in one pass."""
    files = {}
    with gzip.open(path) as stream:
        with tarfile.open(fileobj=stream, mode='r|') as tar:
            for entry in tar:
                if entry.isfile():
                    files[Path(entry.name).name] = tar.extractfile(entry).read()
        stream.read()  # gzip compares its checksum at the end of the stream
    return files


def read_cifar(dataset, archive, folder, names, label_bytes, data_dir):
    """Yields the images and labels of the training and test set of CIFAR's binary version.

    Args:
        archive: name of the .tar.gz archive.
        folder: name of the folder that it unpacks to.
        names: of the batch files, the test batch last.
        label_bytes: bytes before the pixels of an image; the last of them is its label.
    """
    path = find_file(dataset, (data_dir, Path(data_dir, dataset)), archive, folder)
    with reading(path):
        if path.is_dir():
            files = {file.name: file.read_bytes() for file in path.glob('*.bin')}
        else:
            files = read_archive(path)
    record = label_bytes + 3 * 32 * 32
    batches = []
    for name in names:
        if name not in files:
            raise BadInput(f'{path}: has no {name}; delete it, and {archive} is read or downloaded')
        if not files[name] or len(files[name]) % record:
            raise BadInput(f'{path}: {name} is not a whole number of records of {record} bytes')
        batches.append(np.frombuffer(files[name], np.uint8).reshape(-1, record))
    for records in (np.concatenate(batches[:-1]), batches[-1]):
        yield records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


def read_svhn(data_dir):
    """Yields the images and labels of the training and test set from SVHN's .mat files."""
    import scipy.io

    for split in ('train', 'test'):
        path = find_file('SVHN', (data_dir, Path(data_dir, 'SVHN')), f'{split}_32x32.mat')
        with reading(path):
            content = scipy.io.loadmat(path)
            images = content['X'].transpose(3, 2, 0, 1)
            labels = content['y'][:, 0]
        yield images, np.where(labels == 10, 0, labels)  # the label 10 means the digit 0


def read_digits(data_dir):
    """Yields the images and labels of both sets of the digits, which ship with the program."""
    content = np.load(ROOT / 'data' / 'digits.npz')
    images, labels = content['images'][:, None], content['labels']
    yield images[:1437], labels[:1437]
    yield images[1437:], labels[1437:]


CIFAR10 = (
    'CIFAR10',
    'cifar-10-binary.tar.gz',
    'cifar-10-batches-bin',
    [f'data_batch_{number}.bin' for number in range(1, 6)] + ['test_batch.bin'],
    1,
)
CIFAR100 = (
    'CIFAR100',
    'cifar-100-binary.tar.gz',
    'cifar-100-binary',
    ['train.bin', 'test.bin'],
    2,
)

# name -> (reader, shape of an image, number of classes, largest pixel). A reader is a function of
# data_dir that yields images (N, C, H, W) and integer labels (N,): of training, then of test data.
DATASETS = {
    'MNIST': (functools.partial(read_mnist, 'MNIST'), (1, 28, 28), 10, 255),
    'FashionMNIST': (functools.partial(read_mnist, 'FashionMNIST'), (1, 28, 28), 10, 255),
    'SVHN': (read_svhn, (3, 32, 32), 10, 255),
    'CIFAR10': (functools.partial(read_cifar, *CIFAR10), (3, 32, 32), 10, 255),
    'CIFAR100': (functools.partial(read_cifar, *CIFAR100), (3, 32, 32), 100, 255),
    'digits': (read_digits, (1, 8, 8), 10, 16),
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
        data_dir: folder of the files, also as torchvision arranges them; missing ones are
            downloaded to it.
        normalize: False for pixels in [0, 1]; True to standardize each channel by its mean and
            standard deviation over the whole training set, also for a subset of it.
        train_samples: size of the training set, a random subset; smaller subsets are part of
            larger ones. 0: all samples, in the order of the file.
        label_noise: share p of wrong training labels. Of the n labels after the first
            `clean_samples`, exactly round(p n) are replaced, each by a random other class. A
            larger share keeps the wrong labels of a smaller one.
        clean_samples: number of training samples, the first ones, whose labels stay correct.
        data_seed: seed of the subset and of the wrong labels, which depend on no other seed.
    Returns:
        Namespace of name, num_classes, input_shape (C, H, W), train_images (m, C, H, W) float32,
        train_labels (m,) int64, and test_images and test_labels, which are never made wrong.
    Raises:
        BadInput: a file is missing and cannot be downloaded, or is damaged; the data are not as
            DATASETS declares; or there are fewer samples than asked for.
    """
    if name not in DATASETS:
        hint = closest(name, DATASETS)
        raise BadInput(f'dataset_name = {name!r}: must be one of {", ".join(DATASETS)}{hint}')
    reader, shape, classes, largest = DATASETS[name]
    parts = list(reader(data_dir))
    if [type(array) for part in parts for array in part] != 4 * [np.ndarray]:
        raise BadInput(
            f'{name}: its reader must yield two pairs of NumPy arrays, (images, labels) '
            'for training and (images, labels) for test'
        )
    (images, labels), (test_images, test_labels) = parts
    check_arrays(name, 'training', images, labels)
    check_arrays(name, 'test', test_images, test_labels)
    if normalize:
        mean, std = mean_and_std(name, images, largest)
    if train_samples > len(images):
        raise BadInput(f'train_samples = {train_samples}: there are {len(images)}; 0 takes all')

    # Two streams, so that wrong labels do not depend on whether a subset is drawn.
    subset, noise = map(np.random.default_rng, np.random.SeedSequence(data_seed).spawn(2))
    if train_samples:
        chosen = subset.permutation(len(images))[:train_samples]
        images, labels = images[chosen], labels[chosen]
    labels, test_labels = labels.astype(np.int64), test_labels.astype(np.int64)
    make_wrong(labels, classes, label_noise, clean_samples, noise)

    def pixels(array):
        # On the CPU: another device could round differently, and a run resumed there would differ.
        tensor = torch.from_numpy(array.astype(np.float32)).div_(largest)
        if normalize:
            tensor.sub_(mean).div_(std)
        return tensor.contiguous(memory_format=torch.channels_last).to(device)

    dataset = SimpleNamespace(name=name, num_classes=classes, input_shape=shape)
    dataset.train_images = pixels(images)
    dataset.train_labels = torch.from_numpy(labels).to(device)
    dataset.test_images = pixels(test_images)
    dataset.test_labels = torch.from_numpy(test_labels).to(device)
    return dataset


def check_arrays(name, part, images, labels):
    """Raises BadInput where a part that a reader yields is not what DATASETS declares."""
    _, shape, classes, largest = DATASETS[name]
    if images.shape[1:] != shape:
        raise BadInput(
            f'{name}: {part} images of shape {images.shape[1:]}, where DATASETS declares {shape}'
        )
    if labels.ndim != 1 or labels.dtype.kind not in 'iu':
        raise BadInput(
            f'{name}: {part} labels of {labels.dtype} and shape {labels.shape}; they must be '
            'integers, one per image'
        )
    if len(images) != len(labels) or not len(images):
        raise BadInput(
            f'{name}: {len(labels)} labels for {len(images)} {part} images; '
            'the files of two sets may be mixed up'
        )
    if not images.max() <= largest:  # also where a pixel is nan
        raise BadInput(
            f'{name}: a pixel of {images.max()} in a {part} image, where DATASETS declares '
            f'{largest} as the largest'
        )
    for label in (labels.min(), labels.max()):
        if not 0 <= label < classes:
            raise BadInput(
                f'{name}: a {part} label is {label}; DATASETS declares labels 0 to {classes - 1}'
            )


def mean_and_std(name, images, largest):
    """Mean and standard deviation of each channel, (1, C, 1, 1) in float64, over `largest`."""
    if images.dtype.kind not in 'iu' or images.min() < 0:
        raise BadInput(
            f'normalize = True: the pixels of {name} are not integers from 0 to {largest}; '
            'set it to False'
        )
    # From the counts of each pixel value: unlike a sum over pixels they have no order, on which,
    # and so on the number of threads, the last digits would depend.
    channels = images.swapaxes(0, 1)
    counts = np.stack([np.bincount(channel.ravel(), minlength=largest + 1) for channel in channels])
    shares = counts / counts.sum(1, keepdims=True)
    values = np.arange(largest + 1, dtype=np.float32) / np.float32(largest)  # as `load_dataset`
    mean = shares @ values.astype(np.float64)
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a constant channel has nothing to scale
    return [torch.from_numpy(value).view(1, -1, 1, 1) for value in (mean, std)]


def make_wrong(labels, classes, label_noise, clean_samples, generator):
    """Makes labels wrong in place; see `load_dataset`."""
    others = len(labels) - clean_samples
    if others < 0:
        raise BadInput(f'clean_samples = {clean_samples}: there are {len(labels)} training samples')
    if not 0 <= label_noise <= 1:
        raise BadInput(f'label_noise = {label_noise}: must be a share from 0 to 1')
    wrong = generator.permutation(others)[: round(label_noise * others)]
    # Drawn for all labels, so that a larger share only adds wrong ones.
    steps = generator.integers(1, classes, others)
    index = clean_samples + wrong
    labels[index] = (labels[index] + steps[wrong]) % classes


def crops(images, variants):
    """A random crop of each image padded with zeros, of the image's own size, mirrored or not.

    Zero is black, and the mean of the training set where a dataset is normalized.

    Args:
        images: (B, C, H, W).
        variants: (B,) integers from 0 to VARIANTS - 1: which shift, and mirrored where odd.
    Returns:
        (B, C, H, W), in channels_last format. A CUDA graph can capture it: it never waits for the
        device.
    """
    device = images.device
    height, width = images.shape[2:]
    shift = variants[:, None] // 2
    mirrored = variants[:, None] % 2 == 1
    # Indices (B, H) and (B, W) of each crop's rows and columns in the padded image.
    rows = torch.arange(height, device=device) + shift // SHIFTS
    columns = torch.arange(width, device=device)
    columns = torch.where(mirrored, columns.flip(0), columns) + shift % SHIFTS
    each = torch.arange(len(images), device=device)[:, None, None]
    padded = F.pad(images, [PADDING] * 4)
    return padded[each, :, rows[:, :, None], columns[:, None]].movedim(3, 1)


def fingerprint(dataset):
    """A hash, as 32 hexadecimal digits, of all images and labels of a dataset."""
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

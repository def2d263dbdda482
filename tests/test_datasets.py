"""Every reader, on small files in the true format, and on every way in which such a file can be wrong."""

import gzip
import hashlib
import io
import os
import random
import resource
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import utils
from conf import BadInput
from utils import load_dataset, read_idx

RANDOM = np.random.default_rng(0)


def idx(array):
    return struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes()


def sample(count, shape, classes=10):
    return RANDOM.integers(0, 256, (count, *shape), np.uint8), RANDOM.integers(0, classes, count, np.uint8)


def make_idx(data_dir, name='MNIST', folder='raw', compressed=True, counts=(70, 20)):
    """The four files of an IDX dataset in data_dir, and what they hold: [(images, labels)] of train and test."""
    parts = []
    folder = Path(data_dir, name, folder)
    folder.mkdir(parents=True)
    for split, count in zip(('train', 't10k'), counts):
        parts.append(sample(count, (28, 28)))
        for kind, array in zip(('images-idx3', 'labels-idx1'), parts[-1]):
            content = idx(array)
            path = folder / f'{split}-{kind}-ubyte{".gz" if compressed else ""}'
            path.write_bytes(gzip.compress(content) if compressed else content)
    return parts


def cifar_records(count, label_bytes, classes):
    images, labels = sample(count, (3, 32, 32), classes)
    coarse = np.full((count, label_bytes - 1), 7, np.uint8)
    return images, labels, np.hstack([coarse, labels[:, None], images.reshape(count, -1)]).tobytes()


def add_member(tar, name, content, kind=tarfile.REGTYPE, target=''):
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = len(content), kind, target
    tar.addfile(entry, io.BytesIO(content))


CIFAR10_BATCHES = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
CIFAR = {
    'CIFAR10': ('cifar-10-binary.tar.gz', 'cifar-10-batches-bin', CIFAR10_BATCHES),
    'CIFAR100': ('cifar-100-binary.tar.gz', 'cifar-100-binary', ['train.bin', 'test.bin']),
}


def make_cifar(data_dir, name, unpacked=False):
    archive, folder, members = CIFAR[name]
    label_bytes, classes = (1, 10) if name == 'CIFAR10' else (2, 100)
    made = [cifar_records(6, label_bytes, classes) for _ in members]
    if unpacked:
        Path(data_dir, folder).mkdir()
        for member, part in zip(members, made):
            Path(data_dir, folder, member).write_bytes(part[2])
    else:
        with tarfile.open(Path(data_dir, archive), 'w:gz') as tar:
            add_member(tar, f'{folder}/readme.html', b'not a batch')
            for member, part in zip(members, made):
                add_member(tar, f'{folder}/{member}', part[2])
    train = [np.concatenate([part[i] for part in made[:-1]]) for i in (0, 1)]
    return [train, made[-1][:2]]


def make_svhn(data_dir):
    io_module = pytest.importorskip('scipy.io')
    parts = []
    for split, count in (('train', 12), ('test', 5)):
        images, labels = sample(count, (3, 32, 32))
        content = {'X': images.transpose(2, 3, 1, 0), 'y': np.where(labels == 0, 10, labels)[:, None]}
        io_module.savemat(Path(data_dir, f'{split}_32x32.mat'), content, do_compression=True)
        parts.append((images, labels))
    return parts


def assert_holds(dataset, parts):
    for part, (images, labels) in zip(('train', 'test'), parts):
        images = images.reshape(len(images), -1, *images.shape[-2:])
        loaded = getattr(dataset, f'{part}_images')
        assert loaded.dtype == torch.float32 and loaded.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(loaded.numpy(), images.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(getattr(dataset, f'{part}_labels').numpy(), labels)


@pytest.mark.parametrize('name', ['MNIST', 'FashionMNIST'])
@pytest.mark.parametrize('folder', ['raw', '.'])
@pytest.mark.parametrize('compressed', [True, False])
def test_idx(tmp_path, name, folder, compressed):
    parts = make_idx(tmp_path, name, folder, compressed)
    dataset = load_dataset(name, tmp_path)
    assert_holds(dataset, parts)
    assert (dataset.num_classes, dataset.input_shape) == (10, (1, 28, 28))


@pytest.mark.parametrize('unpacked', [True, False])
@pytest.mark.parametrize('name', CIFAR)
def test_cifar(tmp_path, name, unpacked):
    parts = make_cifar(tmp_path, name, unpacked)
    dataset = load_dataset(name, tmp_path)
    assert_holds(dataset, parts)
    assert (dataset.num_classes, dataset.input_shape) == (100 if name == 'CIFAR100' else 10, (3, 32, 32))


def test_svhn(tmp_path):
    parts = make_svhn(tmp_path)
    assert_holds(load_dataset('SVHN', tmp_path), parts)


def test_svhn_without_scipy_says_so(tmp_path, monkeypatch):
    (tmp_path / 'train_32x32.mat').write_bytes(b'')
    monkeypatch.setitem(__import__('sys').modules, 'scipy', None)
    monkeypatch.setitem(__import__('sys').modules, 'scipy.io', None)
    with pytest.raises(BadInput, match='pip install scipy'):
        load_dataset('SVHN', tmp_path)


def test_digits(digits):
    assert (len(digits.train_images), len(digits.test_images), digits.input_shape) == (1437, 360, (1, 8, 8))
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    assert digits.train_labels[:10].tolist() == list(range(10))


def test_mnist(mnist):
    assert (len(mnist.train_images), len(mnist.test_images)) == (60000, 10000)
    assert mnist.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    raw = read_idx(Path(os.environ['DATA_DIR'], 'MNIST', 'raw', 'train-images-idx3-ubyte.gz'), (28, 28))
    assert hashlib.md5(idx(raw)).hexdigest() == '6bbc9ace898e44ae57da46a324031adb'


def test_normalize(tmp_path):
    make_cifar(tmp_path, 'CIFAR10')
    plain, normalized = load_dataset('CIFAR10', tmp_path), load_dataset('CIFAR10', tmp_path, normalize=True)
    std, mean = torch.std_mean(plain.train_images, dim=(0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(normalized.test_images, (plain.test_images - mean) / std)


# Wrong files. Each case changes the good bytes of one file, decompressed and compressed again where it is a .gz.
WRONG_IDX = {
    'truncated': ('train-images-idx3', lambda content: content[:-1], 'fewer bytes'),
    'header only': ('train-images-idx3', lambda content: content[:16], 'fewer bytes'),
    'torn header': ('train-images-idx3', lambda content: content[:7], 'damaged or truncated'),
    'empty': ('train-images-idx3', lambda content: b'', 'damaged or truncated'),
    'trailing': ('train-images-idx3', lambda content: content + b'x', 'more bytes'),
    'magic': ('train-images-idx3', lambda content: b'\0\0\x0d\x03' + content[4:], '0x00000d03'),
    'labels for images': ('train-images-idx3', lambda content: idx(np.zeros(70, np.uint8)), '0x00000801'),
    'images for labels': ('train-labels-idx1', lambda content: idx(np.zeros((70, 28, 28), np.uint8)), '0x00000803'),
    'another size': ('train-images-idx3', lambda content: idx(np.zeros((70, 8, 8), np.uint8)), '(8, 8), not (28, 28)'),
    'huge': ('train-images-idx3', lambda content: content[:4] + b'\xff' * 4 + content[8:], 'declares 4294967295'),
    'another set': ('train-labels-idx1', lambda content: idx(np.zeros(69, np.uint8)), '69 labels for 70 train images'),
    'label': ('t10k-labels-idx1', lambda content: content[:-1] + b'\x0a', 'label 10 is out of range'),
    'no images': ('t10k-images-idx3', lambda content: idx(np.zeros((0, 28, 28), np.uint8)), '20 labels for 0 test'),
}


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('case', WRONG_IDX)
def test_wrong_idx_files_are_named(tmp_path, case, compressed):
    make_idx(tmp_path, compressed=compressed)
    kind, change, message = WRONG_IDX[case]
    path = tmp_path / 'MNIST' / 'raw' / f'{kind}-ubyte{".gz" if compressed else ""}'
    content = path.read_bytes()
    path.write_bytes(gzip.compress(change(gzip.decompress(content))) if compressed else change(content))
    with pytest.raises(BadInput) as caught:
        load_dataset('MNIST', tmp_path)
    assert message in str(caught.value) and str(path.parent) in str(caught.value) and '\n' not in str(caught.value)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_gzip_bombs_take_bounded_memory(tmp_path):
    make_idx(tmp_path)
    path = tmp_path / 'MNIST' / 'raw' / 'train-images-idx3-ubyte.gz'
    with gzip.open(path, 'wb', compresslevel=1) as file:  # a gigabyte of zeros behind a header of 70 images
        file.write(idx(np.zeros((70, 28, 28), np.uint8)))
        for _ in range(1024):
            file.write(bytes(2**20))
    before = peak_memory()
    with pytest.raises(BadInput, match='more bytes'):
        load_dataset('MNIST', tmp_path)
    archive, folder, _ = CIFAR['CIFAR10']
    with tarfile.open(tmp_path / archive, 'w:gz', compresslevel=1) as tar:
        entry = tarfile.TarInfo(f'{folder}/data_batch_1.bin')
        entry.size = 2**30
        tar.addfile(entry, open('/dev/zero', 'rb'))
    with pytest.raises(BadInput, match='unpacks to more'):
        load_dataset('CIFAR10', tmp_path)
    assert peak_memory() - before < 200e6


def test_archive_members_cannot_reach_outside(tmp_path):
    archive, folder, members = CIFAR['CIFAR100']
    _, _, records = cifar_records(6, 2, 100)
    (tmp_path / 'outside.bin').write_bytes(records)
    for wrong in (('link', tarfile.SYMTYPE), ('hard link', tarfile.LNKTYPE), ('folder', tarfile.DIRTYPE)):
        with tarfile.open(tmp_path / archive, 'w:gz') as tar:
            add_member(tar, f'{folder}/train.bin', b'', wrong[1], str(tmp_path / 'outside.bin'))
            add_member(tar, f'{folder}/test.bin', records)
            add_member(tar, '../../escaped.bin', records)
        with pytest.raises(BadInput, match='has no cifar-100-binary/train.bin'):
            load_dataset('CIFAR100', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive, 'outside.bin']


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
@pytest.mark.parametrize('content', [b'', b'x', b'x' * 3075])
def test_wrong_cifar_batches_are_named(tmp_path, name, content):
    make_cifar(tmp_path, name, unpacked=True)
    _, folder, members = CIFAR[name]
    (tmp_path / folder / members[0]).write_bytes(content)
    with pytest.raises(BadInput, match=f'{members[0]} is not a whole number of records'):
        load_dataset(name, tmp_path)
    (tmp_path / folder / members[0]).unlink()
    with pytest.raises(BadInput, match=members[0]):
        load_dataset(name, tmp_path)


MAKERS = {
    'MNIST': (make_idx, '*/raw/*'),
    'CIFAR10': (lambda data_dir: make_cifar(data_dir, 'CIFAR10'), '*.gz'),
    'CIFAR100': (lambda data_dir: make_cifar(data_dir, 'CIFAR100'), '*.gz'),
    'SVHN': (make_svhn, '*.mat'),
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', MAKERS)
def test_mutated_files_are_refused_or_read_right(tmp_path, name):
    """Truncations, flipped bits, cut-out and doubled pieces: an error of one line, or the very arrays of the good file."""
    maker, pattern = MAKERS[name]
    parts = maker(tmp_path)
    chance = random.Random(0)
    files = {path: path.read_bytes() for path in sorted(tmp_path.glob(pattern))}
    refused = 0
    for trial in range(int(os.environ.get('MUTATIONS', 150))):
        path, content = chance.choice(list(files.items()))
        changed = bytearray(content)
        at, length = chance.randrange(len(content)), chance.randrange(1, 200)
        # Formats without checksums cannot tell a flipped pixel; in their headers every bit matters.
        kind = chance.choice(('cut', 'remove', 'double', 'flip', 'append'))
        if kind == 'cut':
            del changed[at:]
        elif kind == 'remove':
            del changed[at : at + length]
        elif kind == 'double':
            changed[at:at] = changed[at : at + length]
        elif kind == 'append':
            changed += bytes(length)
        else:
            changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            dataset = load_dataset(name, tmp_path)
        except BadInput as error:
            assert str(tmp_path) in str(error) and '\n' not in str(error), (trial, kind, at, error)
            refused += 1
        else:
            assert_holds(dataset, parts)
        path.write_bytes(content)
    assert refused > trial / 2


def test_download(tmp_path, monkeypatch, capsys):
    source, data_dir = tmp_path / 'source', tmp_path / 'data'
    parts = make_idx(source)
    files = sorted((source / 'MNIST' / 'raw').iterdir())
    served = {path.name: (path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()) for path in files}
    monkeypatch.setitem(utils.DOWNLOADS, 'MNIST', served)
    assert_holds(load_dataset('MNIST', data_dir), parts)
    assert sorted(path.name for path in (data_dir / 'MNIST' / 'raw').iterdir()) == sorted(served)
    assert '100%' in capsys.readouterr().err

    broken = data_dir / 'MNIST' / 'raw' / files[0].name
    broken.unlink()
    files[0].write_bytes(b'something else')
    with pytest.raises(BadInput, match='MD5'):
        load_dataset('MNIST', data_dir)
    assert not broken.exists() and len(list(broken.parent.iterdir())) == 3


@pytest.mark.parametrize('name', ['MNIST', 'FashionMNIST', 'CIFAR10', 'CIFAR100', 'SVHN'])
def test_missing_dataset_says_what_to_do(tmp_path, monkeypatch, name):
    nowhere = {file: ((tmp_path / 'gone').as_uri(), md5) for file, (_, md5) in utils.DOWNLOADS[name].items()}
    monkeypatch.setitem(utils.DOWNLOADS, name, nowhere)
    with pytest.raises(BadInput) as caught:
        load_dataset(name, tmp_path / 'data')
    message = str(caught.value)
    assert f'put it into {tmp_path / "data"}' in message and '--settings conf/digits.py' in message
    assert next(iter(nowhere)) in message and '\n' not in message


def test_wrong_file_at_the_command_line(tmp_path):
    make_idx(tmp_path / 'data')
    path = tmp_path / 'data' / 'MNIST' / 'raw' / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-100])
    environment = os.environ | {'DATA_DIR': str(tmp_path / 'data')}
    status, stdout, stderr = run('--width', 2, '--results-dir', tmp_path / 'results', env=environment, cwd=ROOT)
    assert status == 2 and stdout == ''
    assert stderr.count('\n') == 1 and str(path) in stderr and 'delete the file' in stderr
    assert not (tmp_path / 'results').exists()

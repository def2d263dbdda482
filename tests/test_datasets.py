"""Every reader, on small files in the true format, and on every way in which it can be wrong; subsets and wrong labels."""

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

import datasets
from conf import BadInput
from datasets import VARIANTS, crops, fingerprint, load_dataset, read_idx

RANDOM = np.random.default_rng(0)


def idx(array):
    return struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes()


def sample(count, shape, classes=10):
    return RANDOM.integers(0, 256, (count, *shape), np.uint8), RANDOM.integers(
        0, classes, count, np.uint8
    )


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
        content = {
            'X': images.transpose(2, 3, 1, 0),
            'y': np.where(labels == 0, 10, labels)[:, None],
        }
        io_module.savemat(Path(data_dir, f'{split}_32x32.mat'), content, do_compression=True)
        parts.append((images, labels))
    return parts


def assert_holds(dataset, parts):
    for part, (images, labels) in zip(('train', 'test'), parts):
        images = images.reshape(len(images), -1, *images.shape[-2:])
        loaded = getattr(dataset, f'{part}_images')
        assert loaded.dtype == torch.float32 and loaded.is_contiguous(
            memory_format=torch.channels_last
        )
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
    assert (dataset.num_classes, dataset.input_shape) == (
        100 if name == 'CIFAR100' else 10,
        (3, 32, 32),
    )


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
    assert (len(digits.train_images), len(digits.test_images), digits.input_shape) == (
        1437,
        360,
        (1, 8, 8),
    )
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    assert digits.train_labels[:10].tolist() == list(range(10))


def test_mnist(mnist):
    assert (len(mnist.train_images), len(mnist.test_images)) == (60000, 10000)
    assert mnist.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    raw = read_idx(
        Path(os.environ['DATA_DIR'], 'MNIST', 'raw', 'train-images-idx3-ubyte.gz'), (28, 28)
    )
    assert hashlib.md5(idx(raw)).hexdigest() == '6bbc9ace898e44ae57da46a324031adb'


def test_normalize(tmp_path):
    make_cifar(tmp_path, 'CIFAR10')
    plain, normalized = (
        load_dataset('CIFAR10', tmp_path),
        load_dataset('CIFAR10', tmp_path, normalize=True),
    )
    std, mean = torch.std_mean(plain.train_images, dim=(0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(normalized.test_images, (plain.test_images - mean) / std)
    subset = load_dataset('CIFAR10', tmp_path, normalize=True, train_samples=4)
    torch.testing.assert_close(
        subset.test_images, normalized.test_images, rtol=0, atol=0
    )  # an image is the same input


def test_a_constant_channel_is_normalized_to_zero(tmp_path):
    make_idx(tmp_path)
    path = tmp_path / 'MNIST' / 'raw' / 'train-images-idx3-ubyte.gz'
    path.write_bytes(gzip.compress(idx(np.full((70, 28, 28), 77, np.uint8))))
    assert not load_dataset('MNIST', tmp_path, normalize=True).train_images.any()


def draw(**knobs):
    return load_dataset('digits', 'nowhere', **knobs)


def test_training_subsets_are_nested_and_seeded(digits):
    small, large, other = (
        draw(train_samples=200),
        draw(train_samples=900),
        draw(train_samples=200, data_seed=1),
    )
    assert torch.equal(small.train_images, large.train_images[:200])
    assert torch.equal(small.train_labels, large.train_labels[:200])
    assert not torch.equal(small.train_images, other.train_images)
    whole = draw(train_samples=1437)
    assert not torch.equal(whole.train_labels, digits.train_labels)
    pairs = [{(label.item(), *image.flatten().tolist()) for image, label in zip(part.train_images, part.train_labels)}
             for part in (whole, digits, small)]  # fmt: skip
    assert pairs[0] == pairs[1] and pairs[2] < pairs[0] and len(pairs[2]) == 200
    for part in (small, large, other, whole):
        assert torch.equal(part.test_images, digits.test_images) and torch.equal(
            part.test_labels, digits.test_labels
        )


@pytest.mark.parametrize('clean, samples', [(0, 0), (300, 0), (300, 700), (700, 700)])
@pytest.mark.parametrize('noise', [0.0, 0.1, 0.3, 1.0])
def test_label_noise_is_exact(noise, clean, samples):
    true = draw(train_samples=samples)
    noisy = draw(train_samples=samples, clean_samples=clean, label_noise=noise)
    wrong = noisy.train_labels != true.train_labels
    assert wrong.sum() == round(noise * (len(wrong) - clean)) and not wrong[:clean].any()
    assert 0 <= noisy.train_labels.min() and noisy.train_labels.max() <= 9
    assert torch.equal(noisy.train_images, true.train_images) and torch.equal(
        noisy.test_labels, true.test_labels
    )


def test_wrong_labels_are_nested_uniform_and_of_their_own_seed(digits):
    labels = {noise: draw(label_noise=noise).train_labels for noise in (0.1, 0.5, 1.0)}
    few, many = (labels[noise] != digits.train_labels for noise in (0.1, 0.5))
    assert (many | ~few).all() and torch.equal(labels[0.1][few], labels[1.0][few])
    steps = torch.bincount((labels[1.0] - digits.train_labels) % 10, minlength=10)
    assert steps[0] == 0 and ((steps[1:] - 1437 / 9).abs() < 4 * (1437 / 9) ** 0.5).all()
    again, other = (
        draw(label_noise=0.5).train_labels,
        draw(label_noise=0.5, data_seed=1).train_labels,
    )
    assert torch.equal(again, labels[0.5]) and not torch.equal(other, labels[0.5])
    for seed in range(
        3
    ):  # no shuffle of a training, drawn from (seed, epoch), puts the wrong ones first
        for epoch in range(1, 4):
            first = np.random.default_rng((seed, epoch)).permutation(1437)[: few.sum()]
            assert few[first].float().mean() < 0.4


@pytest.mark.parametrize('knobs', [
    {'train_samples': 1438}, {'clean_samples': 1438}, {'train_samples': 10, 'clean_samples': 11}, {'label_noise': 1.1},
    {'label_noise': float('nan')},
])  # fmt: skip
def test_impossible_draws_name_the_knob(knobs):
    with pytest.raises(BadInput, match=f'^{list(knobs)[-1]} = ') as caught:
        draw(**knobs)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('channels_last', [True, False])
def test_crops(channels_last):
    """The variants are all the shifts by at most 4 pixels along both axes, each mirrored and not; one is the image itself."""
    images = torch.arange(1.0, 1 + 2 * 3 * 6 * 5).view(2, 3, 6, 5)
    images = images.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for number in range(2):
        found = crops(images[[number] * VARIANTS], torch.arange(VARIANTS))
        assert found.shape == (VARIANTS, 3, 6, 5) and found.is_contiguous(
            memory_format=torch.channels_last
        )
        windows = [
            padded[number, :, top : top + 6, left : left + 5]
            for top in range(9)
            for left in range(9)
        ]
        expected = [window[..., ::step] for window in windows for step in (1, -1)]
        assert {crop.tobytes() for crop in found.numpy()} == {crop.tobytes() for crop in expected}
        assert (
            len(expected) == VARIANTS
            and np.array_equal(found[::2], windows)
            and torch.equal(found[80], images[number])
        )
    mixed = crops(images, torch.tensor([3, 160]))
    assert np.array_equal(mixed, np.stack([padded[0, :, :6, 1:6][..., ::-1], padded[1, :, 8:, 8:]]))


def test_fingerprint(digits):
    """It tells apart whatever changes a single label or pixel of either part, and nothing else."""
    print_ = fingerprint(digits)
    assert print_ == fingerprint(draw()) and len(print_) == 32 and int(print_, 16)
    different = [
        draw(train_samples=1436),
        draw(train_samples=1437),
        draw(label_noise=1 / 1437),
        draw(normalize=True),
    ]
    for name, index in (
        ('train_labels', 7),
        ('test_labels', 3),
        ('train_images', (5000 % 1437, 0, 3, 3)),
        ('test_images', -1),
    ):
        different.append(draw())
        tensor = getattr(different[-1], name)
        tensor[index] = 9 - tensor[index]
    assert len({print_, *map(fingerprint, different)}) == 1 + len(different)
    digits_ = draw()
    digits_.train_images = digits_.train_images.contiguous(memory_format=torch.contiguous_format)
    assert fingerprint(digits_) == print_  # the layout in memory is none of the data


# A user's reader of two parts of four images of shape (1, 2, 2) with the labels 0 to 3, made wrong; the words that name it.
WRONG_READERS = {
    'one part': (lambda parts: parts[:1], 'mine: its reader yields 1 of the two parts'),
    'no part': (lambda parts: [], 'mine: its reader yields 0 of the two parts'),
    'another shape': (
        lambda parts: [(images[:, :, :1], labels) for images, labels in parts],
        r'\(1, 1, 2\); DATASETS',
    ),
    'no channels': (
        lambda parts: [(images[:, 0], labels) for images, labels in parts],
        r'\(2, 2\); DATASETS declares \(1',
    ),
    'negative labels': (
        lambda parts: [(images, labels - 1) for images, labels in parts],
        'label -1 is out of range',
    ),
    'labels too large': (
        lambda parts: [(images, labels + 1) for images, labels in parts],
        'label 4 is out of range',
    ),
    'pixels too large': (
        lambda parts: [(images + 240.5, labels) for images, labels in parts],
        'pixel of 255.5 in a train',
    ),
    'pixels of nan': (
        lambda parts: [(images * np.nan, labels) for images, labels in parts],
        'pixel of nan in a train',
    ),
    'labels of floats': (
        lambda parts: [(images, labels / 2) for images, labels in parts],
        'must be integers',
    ),
    'labels of a column': (
        lambda parts: [(images, labels[:, None]) for images, labels in parts],
        'must be integers',
    ),
    'floats to normalize': (
        lambda parts: [(images / 255, labels) for images, labels in parts],
        'normalize = True',
    ),
    'negative pixels': (
        lambda parts: [(images.astype(int) - 9, labels) for images, labels in parts],
        'normalize = True',
    ),
}


@pytest.mark.parametrize('case', WRONG_READERS)
def test_what_a_users_reader_yields_is_checked(monkeypatch, case):
    change, message = WRONG_READERS[case]

    def read(data_dir):
        part = np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2), np.arange(4)
        yield from (('my_file', *changed) for changed in change([part, part]))

    monkeypatch.setitem(datasets.DATASETS, 'mine', (read, (1, 2, 2), 4, 255))
    with pytest.raises(BadInput, match=message) as caught:
        load_dataset('mine', 'nowhere', normalize=True)
    assert '\n' not in str(caught.value)


def test_a_single_class_is_refused(monkeypatch):
    part = np.ones((4, 1, 2, 2), np.uint8), np.zeros(4, int)
    monkeypatch.setitem(
        datasets.DATASETS, 'mine', (lambda data_dir: (('my_file', *part),) * 2, (1, 2, 2), 1, 255)
    )
    with pytest.raises(BadInput, match='mine: DATASETS declares 1 class'):
        load_dataset('mine', 'nowhere')


@pytest.mark.parametrize('kind', ['>u2', '<u2', '>f8', 'i1'])
def test_images_of_any_byte_order_are_their_values(monkeypatch, kind):
    images = np.arange(16).reshape(4, 1, 2, 2)
    part = images.astype(kind), np.arange(4)
    monkeypatch.setitem(
        datasets.DATASETS, 'mine', (lambda data_dir: (('my_file', *part),) * 2, (1, 2, 2), 4, 15)
    )
    assert torch.equal(
        load_dataset('mine', 'nowhere').train_images, torch.from_numpy(images).float() / 15
    )


FIFOS = {
    'MNIST/raw/train-images-idx3-ubyte': 'MNIST',
    'MNIST/raw/train-images-idx3-ubyte.gz': 'MNIST',
    'cifar-10-binary.tar.gz': 'CIFAR10',
    'cifar-10-batches-bin/data_batch_1.bin': 'CIFAR10',
    'train_32x32.mat': 'SVHN',
}


@pytest.mark.parametrize('file', FIFOS)
def test_a_fifo_in_place_of_a_file_does_not_hang(tmp_path, file):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(BadInput, match=f'{path.name} is not a regular file'):
        load_dataset(FIFOS[file], tmp_path)


# Wrong files. Each case changes the good bytes of one file, decompressed and compressed again where it is a .gz.
WRONG_IDX = {
    'truncated': ('train-images-idx3', lambda content: content[:-1], 'fewer bytes'),
    'header only': ('train-images-idx3', lambda content: content[:16], 'fewer bytes'),
    'torn header': ('train-images-idx3', lambda content: content[:7], 'damaged or truncated'),
    'empty': ('train-images-idx3', lambda content: b'', 'damaged or truncated'),
    'trailing': ('train-images-idx3', lambda content: content + b'x', 'more bytes'),
    'magic': ('train-images-idx3', lambda content: b'\0\0\x0d\x03' + content[4:], '0x00000d03'),
    'labels for images': (
        'train-images-idx3',
        lambda content: idx(np.zeros(70, np.uint8)),
        '0x00000801',
    ),
    'images for labels': (
        'train-labels-idx1',
        lambda content: idx(np.zeros((70, 28, 28), np.uint8)),
        '0x00000803',
    ),
    'another size': (
        'train-images-idx3',
        lambda content: idx(np.zeros((70, 8, 8), np.uint8)),
        '(8, 8), not (28, 28)',
    ),
    'huge': (
        'train-images-idx3',
        lambda content: content[:4] + b'\xff' * 4 + content[8:],
        'declares 4294967295',
    ),
    'another set': (
        'train-labels-idx1',
        lambda content: idx(np.zeros(69, np.uint8)),
        '69 labels for 70 train images',
    ),
    'label': (
        't10k-labels-idx1',
        lambda content: content[:-1] + b'\x0a',
        'label 10 is out of range',
    ),
    'no images': (
        't10k-images-idx3',
        lambda content: idx(np.zeros((0, 28, 28), np.uint8)),
        '20 labels for 0 test',
    ),
}


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('case', WRONG_IDX)
def test_wrong_idx_files_are_named(tmp_path, case, compressed):
    make_idx(tmp_path, compressed=compressed)
    kind, change, message = WRONG_IDX[case]
    path = tmp_path / 'MNIST' / 'raw' / f'{kind}-ubyte{".gz" if compressed else ""}'
    content = path.read_bytes()
    path.write_bytes(
        gzip.compress(change(gzip.decompress(content))) if compressed else change(content)
    )
    with pytest.raises(BadInput) as caught:
        load_dataset('MNIST', tmp_path)
    assert (
        message in str(caught.value)
        and str(path.parent) in str(caught.value)
        and '\n' not in str(caught.value)
    )


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_gzip_bombs_take_bounded_memory(tmp_path):
    make_idx(tmp_path)
    path = tmp_path / 'MNIST' / 'raw' / 'train-images-idx3-ubyte.gz'
    with gzip.open(
        path, 'wb', compresslevel=1
    ) as file:  # a gigabyte of zeros behind a header of 70 images
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
    for wrong in (
        ('link', tarfile.SYMTYPE),
        ('hard link', tarfile.LNKTYPE),
        ('folder', tarfile.DIRTYPE),
    ):
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
    served = (
        files[0].parent.as_uri(),
        {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files},
    )
    monkeypatch.setitem(datasets.DOWNLOADS, 'MNIST', served)
    assert_holds(load_dataset('MNIST', data_dir), parts)
    assert sorted(path.name for path in (data_dir / 'MNIST' / 'raw').iterdir()) == sorted(served[1])
    assert '100%' in capsys.readouterr().err

    broken = data_dir / 'MNIST' / 'raw' / files[0].name
    broken.unlink()
    files[0].write_bytes(b'something else')
    with pytest.raises(BadInput, match='MD5'):
        load_dataset('MNIST', data_dir)
    assert not broken.exists() and len(list(broken.parent.iterdir())) == 3


@pytest.mark.parametrize('name', ['MNIST', 'FashionMNIST', 'CIFAR10', 'CIFAR100', 'SVHN'])
def test_missing_dataset_says_what_to_do(tmp_path, monkeypatch, name):
    nowhere = (tmp_path / 'gone').as_uri(), datasets.DOWNLOADS[name][1]
    monkeypatch.setitem(datasets.DOWNLOADS, name, nowhere)
    with pytest.raises(BadInput) as caught:
        load_dataset(name, tmp_path / 'data')
    message = str(caught.value)
    assert f'put it into {tmp_path / "data"}' in message and '--settings conf/digits.py' in message
    assert next(iter(nowhere[1])) in message and '\n' not in message


def test_wrong_file_at_the_command_line(tmp_path):
    make_idx(tmp_path / 'data')
    path = tmp_path / 'data' / 'MNIST' / 'raw' / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-100])
    environment = os.environ | {'DATA_DIR': str(tmp_path / 'data')}
    status, stdout, stderr = run(
        '--width', 2, '--results-dir', tmp_path / 'results', env=environment, cwd=ROOT
    )
    assert status == 2 and stdout == ''
    assert stderr.count('\n') == 1 and str(path) in stderr and 'delete the file' in stderr
    assert not (tmp_path / 'results').exists()

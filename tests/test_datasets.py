"""Datasets: each reader on small files of the true format and on wrong ones; downloads; subsets,
wrong labels, crops and the fingerprint."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, run
from numpy.lib.stride_tricks import sliding_window_view

import datasets
from conf import BadInput
from datasets import VARIANTS, crops, fingerprint, load_dataset

RANDOM = np.random.default_rng(0)
CHANNELS_LAST = torch.channels_last


def refused(name, data_dir, **knobs):
    """The one line with which load_dataset refuses."""
    with pytest.raises(BadInput) as caught:
        load_dataset(name, data_dir, **knobs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def sample(count, shape):
    images = RANDOM.integers(0, 256, (count, *shape), np.uint8)
    return images, RANDOM.integers(0, 10, count, np.uint8)


def idx(array):
    return struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes()


def make_idx(data_dir, name='MNIST', folder='raw', compressed=True):
    """Writes the four files of an IDX dataset; returns [(images, labels)] of train and test."""
    parts = []
    folder = Path(data_dir, name, folder)
    folder.mkdir(parents=True)
    for split, count in (('train', 70), ('t10k', 20)):
        parts.append(sample(count, (28, 28)))
        for kind, array in zip(('images-idx3', 'labels-idx1'), parts[-1]):
            path = folder / f'{split}-{kind}-ubyte'
            if compressed:
                path.with_suffix('.gz').write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return parts


CIFAR10_BATCHES = [f'data_batch_{number}.bin' for number in range(1, 6)] + ['test_batch.bin']
CIFAR = {
    'CIFAR10': ('cifar-10-binary.tar.gz', 'cifar-10-batches-bin', CIFAR10_BATCHES),
    'CIFAR100': ('cifar-100-binary.tar.gz', 'cifar-100-binary', ['train.bin', 'test.bin']),
}


def write_cifar(data_dir, name, batches, unpacked):
    """Writes the batches {file name: bytes} to the folder of CIFAR, or to its archive."""
    archive, folder, _ = CIFAR[name]
    if unpacked:
        Path(data_dir, folder).mkdir(exist_ok=True)
        for member, content in batches.items():
            Path(data_dir, folder, member).write_bytes(content)
    else:
        with tarfile.open(Path(data_dir, archive), 'w:gz') as tar:
            for member, content in batches.items():
                entry = tarfile.TarInfo(f'{folder}/{member}')
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def make_cifar(data_dir, name, unpacked=False):
    """Writes small batches of CIFAR; returns [(images, labels)] of train and test."""
    members = CIFAR[name][2]
    before_label = b'\7' * (name == 'CIFAR100')  # CIFAR-100 has the coarse label first
    made = [sample(6, (3, 32, 32)) for _ in members]
    batches = {'readme.html': b'not a batch'}
    for member, batch in zip(members, made):
        records = [before_label + bytes([label]) + image.tobytes() for image, label in zip(*batch)]
        batches[member] = b''.join(records)
    write_cifar(data_dir, name, batches, unpacked)
    return [tuple(map(np.concatenate, zip(*made[:-1]))), made[-1]]


def make_svhn(data_dir, zero=10):
    parts = [sample(12, (3, 32, 32)), sample(5, (3, 32, 32))]
    for split, (images, labels) in zip(('train', 'test'), parts):
        labels[0] = 0
        content = {'X': images.transpose(2, 3, 1, 0), 'y': np.where(labels, labels, zero)[:, None]}
        scipy.io.savemat(data_dir / f'{split}_32x32.mat', content, do_compression=True)
    return parts


def assert_holds(dataset, parts):
    for part, (images, labels) in zip(('train', 'test'), parts):
        loaded = getattr(dataset, f'{part}_images')
        assert loaded.dtype == torch.float32
        assert loaded.is_contiguous(memory_format=CHANNELS_LAST)
        expected = images.reshape(loaded.shape).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(loaded.numpy(), expected)
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
@pytest.mark.parametrize('name, classes', [('CIFAR10', 10), ('CIFAR100', 100)])
def test_cifar(tmp_path, name, classes, unpacked):
    parts = make_cifar(tmp_path, name, unpacked)
    dataset = load_dataset(name, tmp_path)
    assert_holds(dataset, parts)
    assert (dataset.num_classes, dataset.input_shape) == (classes, (3, 32, 32))


def test_svhn(tmp_path):
    parts = make_svhn(tmp_path)
    assert_holds(load_dataset('SVHN', tmp_path), parts)
    make_svhn(tmp_path, zero=11)
    assert 'a training label is 11' in refused('SVHN', tmp_path)


def test_digits(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8) and len(digits.test_images) == 360
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    assert digits.train_labels[:10].tolist() == list(range(10))


def test_mnist(mnist):
    assert mnist.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert fingerprint(mnist) == '42eabe6e4327bedf361123a41106af51'


def test_normalize(tmp_path):
    make_cifar(tmp_path, 'CIFAR10')
    unscaled = load_dataset('CIFAR10', tmp_path)
    normalized = load_dataset('CIFAR10', tmp_path, normalize=True)
    std, mean = torch.std_mean(unscaled.train_images, dim=(0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(normalized.test_images, (unscaled.test_images - mean) / std)
    # An image is the same input whatever the subset.
    subset = load_dataset('CIFAR10', tmp_path, normalize=True, train_samples=4)
    assert torch.equal(subset.test_images, normalized.test_images)


def draw(**knobs):
    return load_dataset('digits', 'nowhere', **knobs)


def test_data_of_today_are_the_data_of_shipped_runs():
    noisy = draw(train_samples=300, label_noise=0.3, clean_samples=50, data_seed=4)
    assert fingerprint(draw()) == '8f82cd737987bebab592613a479a8602'
    assert fingerprint(noisy) == '46e648d6f1b9db874703082190183ea3'


def test_training_subsets_are_nested_and_seeded(digits):
    small, large, whole = (draw(train_samples=count) for count in (200, 900, 1437))
    assert torch.equal(small.train_images, large.train_images[:200])
    assert torch.equal(small.train_labels, large.train_labels[:200])
    other = draw(train_samples=200, data_seed=1)
    assert not torch.equal(small.train_images, other.train_images)
    assert not torch.equal(whole.train_labels, digits.train_labels)

    def pairs(part):
        samples = zip(part.train_images.flatten(1).tolist(), part.train_labels.tolist())
        return {(label, *image) for image, label in samples}

    assert pairs(whole) == pairs(digits) > pairs(small) and len(pairs(small)) == 200
    assert torch.equal(small.test_images, digits.test_images)
    assert torch.equal(small.test_labels, digits.test_labels)


@pytest.mark.parametrize('clean, samples', [(0, 0), (300, 0), (300, 700), (700, 700)])
@pytest.mark.parametrize('noise', [0.0, 0.1, 0.3, 1.0])
def test_label_noise_is_exact(noise, clean, samples):
    true = draw(train_samples=samples)
    noisy = draw(train_samples=samples, clean_samples=clean, label_noise=noise)
    wrong = noisy.train_labels != true.train_labels
    assert wrong.sum() == round(noise * (len(wrong) - clean)) and not wrong[:clean].any()
    assert 0 <= noisy.train_labels.min() and noisy.train_labels.max() <= 9
    assert torch.equal(noisy.train_images, true.train_images)
    assert torch.equal(noisy.test_labels, true.test_labels)


def test_wrong_labels_are_nested_uniform_and_of_their_own_seed(digits):
    labels = {noise: draw(label_noise=noise).train_labels for noise in (0.1, 0.5, 1.0)}
    few, many = (labels[noise] != digits.train_labels for noise in (0.1, 0.5))
    assert (many | ~few).all() and torch.equal(labels[0.1][few], labels[1.0][few])
    steps = torch.bincount((labels[1.0] - digits.train_labels) % 10, minlength=10)
    assert steps[0] == 0 and ((steps[1:] - 1437 / 9).abs() < 4 * (1437 / 9) ** 0.5).all()
    other = draw(label_noise=0.5, data_seed=1).train_labels
    assert not torch.equal(other, labels[0.5])


@pytest.mark.parametrize(
    'knobs',
    [
        {'train_samples': 1438},
        {'clean_samples': 1438},
        {'train_samples': 10, 'clean_samples': 11},
        {'label_noise': 1.1},
        {'label_noise': float('nan')},
    ],
)
def test_impossible_draws_name_the_knob(knobs):
    assert refused('digits', 'nowhere', **knobs).startswith(f'{list(knobs)[-1]} = ')


@pytest.mark.parametrize('layout', [CHANNELS_LAST, torch.contiguous_format])
def test_crops(layout):
    """Variants are all shifts by at most 4 pixels along both axes, each mirrored and not."""
    images = torch.arange(1.0, 1 + 2 * 3 * 6 * 5).view(2, 3, 6, 5).contiguous(memory_format=layout)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    found = crops(images[[0] * VARIANTS], torch.arange(VARIANTS))
    assert found.is_contiguous(memory_format=CHANNELS_LAST) and torch.equal(found[80], images[0])
    shifts = (
        sliding_window_view(padded[0], (6, 5), (1, 2)).transpose(1, 2, 0, 3, 4).reshape(81, 3, 6, 5)
    )
    assert np.array_equal(found[::2], shifts) and np.array_equal(found[1::2], shifts[..., ::-1])
    mixed = crops(images, torch.tensor([3, 160]))
    assert np.array_equal(mixed, np.stack([padded[0, :, :6, 1:6][..., ::-1], padded[1, :, 8:, 8:]]))


def test_fingerprint(digits):
    """It changes with every single label or pixel of either part, and with nothing else."""
    print_ = fingerprint(digits)
    different = [draw(train_samples=1436), draw(train_samples=1437), draw(label_noise=1 / 1437)]
    places = {'train_labels': 7, 'test_labels': 3, 'train_images': (688, 0, 3, 3), 'test_images': 5}
    for name, index in places.items():
        changed = draw()
        tensor = getattr(changed, name)
        tensor[index] = 9 - tensor[index]
        different.append(changed)
    assert len({print_, *map(fingerprint, different)}) == 1 + len(different)
    digits_ = draw()
    digits_.train_images = digits_.train_images.contiguous(memory_format=torch.contiguous_format)
    assert fingerprint(digits_) == print_  # whatever the layout in memory


# --- a user's own reader ---

IMAGES, LABELS = np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2), np.arange(4)
PAIR = (IMAGES, LABELS)


def register(monkeypatch, parts, largest=255):
    """Registers a dataset 'mine' of four classes whose reader yields these parts."""
    entry = (lambda data_dir: iter(parts)), (1, 2, 2), 4, largest
    monkeypatch.setitem(datasets.DATASETS, 'mine', entry)


WRONG_READERS = {
    'one part': ([PAIR], 'mine: its reader must yield two pairs'),
    'no part': ([], 'mine: its reader must yield two pairs'),
    'three parts': ([PAIR, PAIR, PAIR], 'mine: its reader must yield two pairs'),
    'a path': ([('file', *PAIR)] * 2, 'mine: its reader must yield two pairs'),
    'images alone': ([IMAGES, IMAGES], 'mine: its reader must yield two pairs'),
    'lists': ([(IMAGES, [0, 1, 2, 3])] * 2, 'mine: its reader must yield two pairs'),
    'another shape': (
        [(IMAGES[:, :, :1], LABELS)] * 2,
        '(1, 1, 2), where DATASETS declares (1, 2, 2)',
    ),
    'no channels': ([(IMAGES[:, 0], LABELS)] * 2, '(2, 2), where DATASETS declares (1, 2, 2)'),
    'no images': ([(IMAGES[:0], LABELS[:0])] * 2, '0 labels for 0 training images'),
    'negative labels': ([(IMAGES, LABELS - 1)] * 2, 'a training label is -1'),
    'labels too large': ([PAIR, (IMAGES, LABELS + 1)], 'a test label is 4'),
    'pixels too large': ([(IMAGES + 240.5, LABELS)] * 2, 'a pixel of 255.5 in a training'),
    'pixels of nan': ([(IMAGES * np.nan, LABELS)] * 2, 'a pixel of nan in a training'),
    'labels of floats': ([(IMAGES, LABELS / 2)] * 2, 'must be integers'),
    'labels of a column': ([(IMAGES, LABELS[:, None])] * 2, 'must be integers'),
    'floats to normalize': ([(IMAGES / 255, LABELS)] * 2, 'normalize = True'),
    'negative pixels': ([(IMAGES.astype(int) - 9, LABELS)] * 2, 'normalize = True'),
}


@pytest.mark.parametrize('case', WRONG_READERS)
def test_what_a_users_reader_yields_is_checked(monkeypatch, case):
    parts, message = WRONG_READERS[case]
    register(monkeypatch, parts)
    assert message in refused('mine', 'nowhere', normalize=True)


def test_a_constant_channel_is_normalized_to_zero(monkeypatch):
    register(monkeypatch, [(np.full_like(IMAGES, 77), LABELS), PAIR])
    assert not load_dataset('mine', 'nowhere', normalize=True).train_images.any()


@pytest.mark.parametrize('kind', ['>u2', '<u2', '>f8', 'i1'])
def test_images_of_any_byte_order_are_their_values(monkeypatch, kind):
    register(monkeypatch, [(IMAGES.astype(kind), LABELS)] * 2, largest=15)
    found = load_dataset('mine', 'nowhere').train_images
    assert torch.equal(found, torch.from_numpy(IMAGES).float() / 15)


# --- wrong files ---

IMAGE_FILE = 'train-images-idx3'
ZEROS = idx(np.zeros((70, 28, 28), np.uint8))
WRONG_IDX = {
    'truncated': (IMAGE_FILE, ZEROS[:-1], 'could not be read'),
    'torn header': (IMAGE_FILE, ZEROS[:7], 'could not be read'),
    'empty': (IMAGE_FILE, b'', 'could not be read'),
    'trailing': (IMAGE_FILE, ZEROS + b'x', 'could not be read'),
    'another magic': (IMAGE_FILE, b'\0\0\x0d\x03' + ZEROS[4:], 'not an IDX file of uint8 items'),
    'labels for images': (IMAGE_FILE, idx(np.zeros(70, np.uint8)), 'of shape (28, 28)'),
    'images for labels': ('train-labels-idx1', ZEROS, 'of shape ()'),
    'another size': (IMAGE_FILE, idx(np.zeros((70, 8, 8), np.uint8)), 'of shape (28, 28)'),
    'another count': (IMAGE_FILE, ZEROS[:4] + b'\xff' * 4 + ZEROS[8:], 'could not be read'),
    'another set': (
        'train-labels-idx1',
        idx(np.zeros(69, np.uint8)),
        'MNIST: 69 labels for 70 training images',
    ),
    'a label': ('t10k-labels-idx1', idx(np.full(20, 10, np.uint8)), 'MNIST: a test label is 10'),
}


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('case', WRONG_IDX)
def test_wrong_idx_files_are_named(tmp_path, case, compressed):
    make_idx(tmp_path, compressed=compressed)
    kind, content, message = WRONG_IDX[case]
    path = tmp_path / 'MNIST' / 'raw' / f'{kind}-ubyte'
    if compressed:
        path, content = path.with_suffix('.gz'), gzip.compress(content)
    path.write_bytes(content)
    line = refused('MNIST', tmp_path)
    assert message in line and (line.startswith(f'{path}: ') or line.startswith('MNIST: '))


@pytest.mark.parametrize(
    'name, make, file',
    [
        ('MNIST', make_idx, 'MNIST/raw/train-images-idx3-ubyte.gz'),
        ('CIFAR10', lambda folder: make_cifar(folder, 'CIFAR10'), 'cifar-10-binary.tar.gz'),
        ('SVHN', make_svhn, 'train_32x32.mat'),
    ],
)
def test_damaged_files_are_named(tmp_path, name, make, file):
    """A compressed file that is cut, or has a wrong checksum, never becomes other images."""
    make(tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    for wrong in (
        b'',
        content[:-3],
        content[:middle],
        content[:middle] + flipped + content[middle + 1 :],
    ):
        path.write_bytes(wrong)
        line = refused(name, tmp_path)
        assert line.startswith(f'{path}: could not be read') and 'delete it' in line


@pytest.mark.parametrize('unpacked', [True, False])
@pytest.mark.parametrize('name', CIFAR)
def test_wrong_cifar_batches_are_named(tmp_path, name, unpacked):
    first = CIFAR[name][2][0]
    for content in (b'', b'x', b'x' * 3075):
        write_cifar(tmp_path, name, {first: content}, unpacked)
        assert f'{first} is not a whole number of records' in refused(name, tmp_path)


def test_a_half_unpacked_folder_is_named(tmp_path):
    """Also where the whole archive is beside it, which is read once the folder is gone."""
    parts = make_cifar(tmp_path, 'CIFAR10')
    folder = tmp_path / 'cifar-10-batches-bin'
    folder.mkdir()
    line = refused('CIFAR10', tmp_path)
    assert line.startswith(f'{folder}: has no data_batch_1.bin; delete it, and cifar-10-binary.tar')
    folder.rmdir()
    assert_holds(load_dataset('CIFAR10', tmp_path), parts)


def test_a_folder_with_the_name_of_a_file_is_named(tmp_path):
    """Kaggle's archive of MNIST unpacks to a folder for each file."""
    path = tmp_path / 'MNIST' / 'raw' / 'train-images-idx3-ubyte'
    path.mkdir(parents=True)
    assert refused('MNIST', tmp_path).startswith(f'{path}: is a folder where a file is wanted')


# --- downloads ---


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of this machine, from which MNIST is downloaded, and its images and labels."""
    parts = make_idx(tmp_path / 'source')
    folder = tmp_path / 'source' / 'MNIST' / 'raw'
    md5s = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setitem(datasets.DOWNLOADS, 'MNIST', (folder.as_uri(), md5s))
    return folder, parts


def test_download(tmp_path, source, capsys):
    served, parts = source
    assert_holds(load_dataset('MNIST', tmp_path / 'data'), parts)
    folder = tmp_path / 'data' / 'MNIST' / 'raw'
    assert {path.name for path in folder.iterdir()} == {path.name for path in served.iterdir()}
    assert '100%' in capsys.readouterr().err

    # A wrong download is refused, and leaves nothing of itself.
    path = folder / 'train-images-idx3-ubyte.gz'
    path.unlink()
    (served / path.name).write_bytes(b'something else')
    assert 'has MD5' in refused('MNIST', tmp_path / 'data')
    assert not path.exists() and len(list(folder.iterdir())) == 3


@pytest.mark.usefixtures('source')
def test_an_interrupted_download_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(source, target):
        target.write(source.read(100))
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.shutil, 'copyfileobj', interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset('MNIST', tmp_path / 'data')
    assert list((tmp_path / 'data' / 'MNIST' / 'raw').iterdir()) == []


@pytest.mark.parametrize('name', datasets.DOWNLOADS)
def test_a_missing_file_is_named_with_what_to_do(tmp_path, monkeypatch, name):
    """So are files of other formats with similar names, as torchvision's CIFAR10 has them."""
    md5s = datasets.DOWNLOADS[name][1]
    monkeypatch.setitem(datasets.DOWNLOADS, name, ((tmp_path / 'gone').as_uri(), md5s))
    (tmp_path / 'cifar-10-batches-py').mkdir()
    line = refused(name, tmp_path)
    assert line.startswith(f'{name}: {next(iter(md5s))} is not in {tmp_path}')
    assert 'put it there' in line and '--settings conf/digits.py' in line
    assert ('(which has cifar-10-batches-py)' in line) == name.startswith('CIFAR')


@pytest.mark.process
def test_wrong_file_at_the_command_line(tmp_path):
    make_idx(tmp_path / 'data')
    path = tmp_path / 'data' / 'MNIST' / 'raw' / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-100])
    environment = os.environ | {'DATA_DIR': str(tmp_path / 'data')}
    folder = tmp_path / 'results'
    status, stdout, stderr = run('--results-dir', folder, env=environment, cwd=ROOT)
    assert status == 2 and stdout == ''
    assert stderr.count('\n') == 1 and str(path) in stderr and 'delete it' in stderr
    assert not folder.exists()

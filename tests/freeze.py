"""Writes tests/frozen: what the program computes today, to compare a changed program with.

    python tests/freeze.py [KIND ...]

Run it again only after a change that alters a number on purpose, and say so in the commit. For each
kind of run it keeps metrics.csv and layers.csv without their timings, and the machine: the last
digits depend on the kind of CPU, the number of threads and the version of torch. It also keeps the
networks that each settings file of conf/ and results/ describes, and a hash of the weights of each
network in results/.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / 'tests' / 'frozen'
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

TINY = '--train-samples 320 --epochs 3'  # 10 steps an epoch
TARGET = '--train-samples 320 --target-loss 0.1002'
SPARSE = f'{TINY} --density 0.2 --initial-mask'
CHANNELS = f'{TINY} --density 0.3 --initial-mask erk --regrow-every 3 --channel-sparsity 0.5'
KINDS = {
    'dense': f'{TINY} --layers-every 2 --eval-every 2 --snapshot-every 1',
    'target-rounds': f'{TARGET} --epochs 5 --eval-every 9 --prune-rounds 2',
    'target': f'{TARGET} --epochs 7 --eval-every 9 --measures-every 4 --snapshot-every 1',
    'batch-norm': f'{TINY} --network CONVBN --normalization batch --layers-every 1',
    'rounds': f'{TINY} --prune-rounds 2 --rewind-epoch 1 --layers-every 3 --snapshot-every 1',
    'fine-tuning': f'{TINY} --prune-rounds 1 --prune-fraction 0.8 --rewind-epoch -1',
    'gradient': f'{SPARSE} erk --regrow gradient --regrow-every 4 --snapshot-every 1',
    'one-step-epochs': f'{SPARSE} erk --regrow gradient --batch-size 9999',
    'channels': f'{CHANNELS} --regrow random',
    'channels-gradient': f'{CHANNELS} --regrow gradient',
    'random': f'{SPARSE} random --regrow random --regrow-every 3',
    'certified': '--train-samples 100 --epochs 1 --width 2 --depth 1 --certify-every 1',
    'crop': f'{TINY} --augment crop --layers-every 2',
}
TIMINGS = 'train_seconds', 'eval_seconds'


def machine():
    """What the last digits of a training depend on."""
    from device import describe_machine

    return describe_machine(torch.device('cpu')) | {'threads': 1}


def train_kind(kind, folder):
    """Trains a kind of run into `folder` and returns its `read_tables`."""
    command = [sys.executable, ROOT / 'train.py', '--settings', ROOT / 'tests' / 'small.py']
    command += [*KINDS[kind].split(), '--results-path', folder]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return read_tables(folder)


def read_tables(folder):
    """{file name: rows} of the tables of the only network in a results folder."""
    return {path.name: read_rows(path) for path in sorted(Path(folder).glob('*/*.csv'))}


def read_rows(path):
    """The rows of a table as {column: text}, timings left out."""
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if name not in TIMINGS} for row in rows]


def recipes():
    """{settings file: hash of the names and knobs of the networks that it describes}."""
    from conf import load_launch, load_settings

    hashes = {}
    for path in sorted([*ROOT.glob('conf/*.py'), *ROOT.glob('results/**/global_settings.py')]):
        if path.name == '__init__.py' or path.parts[-2].isdecimal():
            continue
        shipped = 'results' in path.relative_to(ROOT).parts
        runs = (load_launch(path.parent) if shipped else load_settings(path))[1]
        text = json.dumps([sorted(vars(run).items()) for run in runs])
        hashes[str(path.relative_to(ROOT))] = [len(runs), hashlib.sha256(text.encode()).hexdigest()]
    return hashes


def networks():
    """{folder of a shipped network: hash of its weights}."""
    from records import load_network

    hashes = {}
    for path in sorted(ROOT.glob('results/**/weights.pt')):
        net, _ = load_network(path.parent)
        digest = hashlib.sha256()
        for name, value in net.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        hashes[str(path.parent.relative_to(ROOT))] = digest.hexdigest()
    return hashes


def main():
    FROZEN.mkdir(exist_ok=True)
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            tables = train_kind(kind, Path(folder, 'run'))
        (FROZEN / f'{kind}.json').write_text(json.dumps({'machine': machine(), **tables}, indent=0))
        print(kind, flush=True)
    for name, content in (('recipes', recipes()), ('networks', networks())):
        (FROZEN / f'{name}.json').write_text(json.dumps(content, indent=0))


if __name__ == '__main__':
    main()

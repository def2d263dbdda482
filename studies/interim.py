"""Names of the core that the studies call, made of what the core has until it has them itself."""

import sys
from pathlib import Path

import torch

from conf import BadInput
from records import folder_settings as load_launch
from records import write_file
from summary import csv_file

__all__ = ['load_data', 'load_launch', 'run_program', 'train_network', 'write_table']


def load_data(settings):
    from launch import get_inputs

    return get_inputs(settings)[1]


def run_program(main):
    try:
        sys.exit(main())
    except (BadInput, OSError) as error:
        sys.exit(f'error: {error}')


def write_table(path, columns, rows):
    write_file(path, csv_file([dict.fromkeys(columns, float('nan')) | row for row in rows]))


def train_network(settings, dataset, folder):
    import train

    Path(folder).mkdir(parents=True, exist_ok=True)
    train.train(settings, dataset, Path(folder), torch.device('cpu'))

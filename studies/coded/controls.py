"""What training buys a coded network: the tables and the picture of results/coded (docs/coded.md).

python -m studies.coded.controls                 draws results/coded/coded.png from the tables
python -m studies.coded.controls --prove         proves the shipped messages again, and bounds the
                                                 shipped networks by their disagreement
python -m studies.coded.controls --seconds 60    searches each control for 60 CPU seconds

A control is the same search on hidden layers that nobody trained, or on random labels.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import torch

from conf import KNOBS, ROOT, Parser, run_program
from evaluation import rounded_up
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.tails import exact_binomial_inverse
from records import load_data, read_metrics, write_table
from studies.coded.__main__ import compare
from studies.coded.message import count_errors, encode, prove, share
from studies.coded.search import search, unfitted

SHIPPED = ROOT / 'results' / 'coded'
COLUMNS = 'name', 'bytes', 'train_error', 'test_error', 'bound'
SEED_BYTES = 2  # a message of random kernels only says which of 2^16 seeds they are drawn with
WIDTHS = 4, 8, 16
NETWORKS = 'mnist-width/*', 'mnist-depth/*', 'sparse-certificate/*', 'released/*'

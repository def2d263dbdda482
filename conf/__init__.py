"""Settings: conf/global_settings.py, then a settings file, then flags; a list is a sweep."""

import argparse
import ast
import difflib
import itertools
import math
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_SETTINGS = ROOT / 'conf' / 'global_settings.py'
FOLDERS = 'data_dir', 'results_dir'
NOT_SWEPT = (
    *FOLDERS,
    'milestones',
    'device',
    'threads',
    'jobs',
)  # a list in one of these is no sweep

# Every knob: its neutral value and what is allowed. The neutral value has the knob's type, and it
# is the value of results folders that are older than the knob, whatever today's default is.
# Allowed are the values of an interval, one of several texts, or, for None, anything of that type.
KNOBS = {
    'dataset_name': ('MNIST', None),
    'data_dir': ('data', None),
    'normalize': (False, None),
    'train_samples': (0, '[0, inf)'),
    'label_noise': (0.0, '[0, 1]'),
    'clean_samples': (0, '[0, inf)'),
    'data_seed': (0, '[0, 9e18]'),
    'augment': ('none', ('none', 'crop')),
    'network': ('CONV', None),
    'depth': (3, '[1, 1000]'),
    'width': (200, '[1, 1e6]'),
    'kernel_size': (2, '[1, 1e6]'),
    'stride': (1, '[1, 1e6]'),
    'padding': (0, '[0, 1e6]'),
    'normalization': ('weight', ('weight', 'batch', 'none')),
    'bias': (False, None),
    'loss': ('MSE', ('MSE', 'CE', 'L1')),
    'epochs': (500, '[0, 1e9]'),
    'batch_size': (32, '[1, 1e9]'),
    'lr': (0.01, '(0, 1e9]'),
    'milestones': ([60, 120, 160], '[1, inf)'),
    'lr_decay': (0.1, '(0, 1]'),
    'momentum': (0.9, '[0, 1)'),
    'weight_decay': (3e-3, '[0, 1000]'),
    'target_loss': (0.0, '[0, 1e9]'),
    'early_stop_epoch': (0, '[0, inf)'),
    'early_stop_accuracy': (0.5, '[0, 1]'),
    'seed': (0, '[0, 9e18]'),
    'density': (1.0, '(0, 1]'),
    'initial_mask': ('none', ('none', 'random', 'erk', 'snip', 'synflow')),
    'prune_rounds': (0, '[0, 1e6]'),
    'prune_score': ('magnitude', ('magnitude', 'path', 'random')),
    'prune_fraction': (0.2, '(0, 1)'),
    'prune_layers': ('all', ('all', 'conv')),
    'prune_allocation': ('global', ('global', 'layer')),
    'rewind_epoch': (0, '[-1, 1e9]'),
    'rescale_neurons': (False, None),
    'regrow': ('none', ('none', 'random', 'gradient')),
    'regrow_every': (100, '[1, 1e9]'),
    'regrow_fraction': (0.3, '(0, 1)'),
    'regrow_until': (0.75, '[0, 1]'),
    'channel_sparsity': (0.0, '[0, 1)'),
    'device': ('auto', None),
    'precision': ('auto', ('auto', 'float32', 'tf32', 'bf16')),
    'threads': (0, '[0, 1024]'),
    'jobs': (1, '[1, 1024]'),
    'delta': (0.001, '[1e-300, 1)'),
    'gamma': (1.0, '[1e-9, 1e9]'),
    'eval_every': (1, '[1, inf)'),
    'certify_every': (10, '[0, inf)'),
    'measures_every': (0, '[0, inf)'),
    'layers_every': (0, '[0, inf)'),
    'snapshot_every': (0, '[0, inf)'),
    'results_dir': ('results', None),
}

TYPES = {int: 'an integer', float: 'a number', bool: 'True or False', str: 'a text'}


class BadInput(ValueError):
    """Invalid user input; the message says what is wrong and how to fix it, in one line."""


def closest(name, names):
    """' (did you mean X?)' if one of `names` is close to `name`, else ''."""
    lower = {str(other).lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, 1)
    return f' (did you mean {lower[close[0]]}?)' if close else ''


def in_interval(value, interval):
    """Whether a number lies in an interval such as '[0, 1)'."""
    low, high = map(float, interval[1:-1].split(','))
    above = value >= low if interval[0] == '[' else value > low
    below = value <= high if interval[-1] == ']' else value < high
    return above and below and abs(value) < math.inf


def check(name, value):
    """The value of a knob, an int as a float where its type is float. Raises BadInput."""
    neutral, allowed = KNOBS[name]
    if hasattr(value, 'tolist'):  # numpy's numbers
        value = value.tolist()
    if isinstance(neutral, float) and type(value) is int:
        value = float(value)
    if isinstance(neutral, list):
        epochs = list(value) if isinstance(value, (list, tuple)) else [None]
        sound = all(type(epoch) is int and in_interval(epoch, allowed) for epoch in epochs)
        if not sound or epochs != sorted(set(epochs)):
            raise BadInput(f'{name} = {value!r}: must be a list of increasing epochs')
        return epochs
    if type(value) is not type(neutral):
        raise BadInput(f'{name} = {value!r}: must be {TYPES[type(neutral)]}')
    if isinstance(allowed, tuple) and value not in allowed:
        raise BadInput(f'{name} = {value!r}: must be one of {", ".join(allowed)}')
    if isinstance(allowed, str) and not in_interval(value, allowed):
        raise BadInput(f'{name} = {value!r}: must lie in {allowed}')
    if isinstance(value, str) and not (value and value.isprintable()):
        raise BadInput(f'{name} = {value!r}: must be a printable text')
    return value


def check_values(name, value):
    """The checked value of a knob, or the list of its values if it is swept. Raises BadInput."""
    if isinstance(value, range) or type(value).__name__ == 'ndarray':
        value = list(value)
    if name in NOT_SWEPT or not isinstance(value, (list, tuple)):
        return check(name, value)
    values = [check(name, entry) for entry in value]
    if not values:
        raise BadInput(f'{name} = []: an empty sweep; give at least one value')
    if len(set(values)) < len(values):
        raise BadInput(f'{name} = {values}: a value is listed twice')
    return values


def read_settings(path):
    """{knob: value} of a settings file, which is a program. Raises BadInput."""
    try:
        values = runpy.run_path(str(path))
    except OSError as error:
        raise BadInput(f'{path}: cannot be read ({error.strerror})') from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, 'lineno', '?')
        raise BadInput(f'{path}, line {line}: {type(error).__name__}: {error}') from None
    settings = {}
    for name, value in values.items():
        if name in KNOBS:
            settings[name] = check_values(name, value)
        elif not (name.startswith('_') or isinstance(value, ModuleType) or callable(value)):
            rule = 'a name of your own starts with _; a new knob also goes into KNOBS'
            raise BadInput(f'{path}: unknown setting {name}{closest(name, KNOBS)}; {rule}')
    return settings


def load_settings(path=GLOBAL_SETTINGS, flags=None):
    """The networks that a settings file describes; conf/global_settings.py has the other knobs.

    Args:
        path: settings file.
        flags: {knob: value} of the command line, which win.
    Returns:
        (sweep, runs): {knob: value, or list where swept}, and a namespace for each network of the
        product with every knob as a scalar and `name`, the run's folder, as CONV-3-200.
    Raises:
        BadInput: unknown settings, wrong types or values.
    """
    sweep = {name: neutral for name, (neutral, _) in KNOBS.items()}
    return _expand(sweep | read_settings(GLOBAL_SETTINGS) | read_settings(path), flags)


def load_launch(folder, flags=None):
    """As `load_settings`, for a results folder, whose code is not run; retired knobs are ignored.

    Raises:
        BadInput: it has no settings, or they are damaged.
    """
    path = Path(folder, 'global_settings.py')
    try:
        body = ast.parse(path.read_bytes()).body
        values = {line.targets[0].id: ast.literal_eval(line.value) for line in body}
    except FileNotFoundError:
        if not Path(folder).exists():
            raise BadInput(f'{folder}: no such folder') from None
        parent = Path(folder).resolve().parent
        hint = f'; did you mean {parent}?' if (parent / 'global_settings.py').exists() else ''
        raise BadInput(
            f'{folder}: not a results folder, it has no global_settings.py{hint}'
        ) from None
    except (ValueError, SyntaxError, AttributeError):
        raise BadInput(f'{path}: damaged; put back the settings that the launch wrote') from None
    sweep = {name: neutral for name, (neutral, _) in KNOBS.items()}
    return _expand(
        sweep | {name: check_values(name, values[name]) for name in values.keys() & KNOBS}, flags
    )


def _expand(sweep, flags):
    """(sweep, runs) of all knobs, in the order of KNOBS, with the flags over them."""
    for name, value in (flags or {}).items():
        sweep[name] = check_values(name, value)
    lists = {}
    for name, value in sweep.items():
        swept = isinstance(value, list) and name not in NOT_SWEPT
        lists[name] = value if swept else [value]
    named = [
        name for name in lists if len(lists[name]) > 1 and name not in ('network', 'depth', 'width')
    ]
    runs = []
    for values in itertools.product(*lists.values()):
        run = SimpleNamespace(**dict(zip(lists, values)))
        run.name = f'{run.network}-{run.depth}-{run.width}'
        for name in named:
            run.name += f'-{name}{getattr(run, name)}'.replace('/', '_')
        runs.append(run)
    return sweep, runs


def comments():
    """{knob: the comment behind it in conf/global_settings.py}, which is its --help."""
    return dict(re.findall(r'^(\w+) = .*?  # (.*)$', GLOBAL_SETTINGS.read_text('utf-8'), re.M))


def settings_text(sweep, header):
    """The settings file that repeats a launch: `header` (lines) as comments, then the knobs."""
    about = comments()
    lines = [f'# {line}' for line in header] + ['']
    lines += [f'{name} = {value!r}  # {about.get(name, "")}' for name, value in sweep.items()]
    return '\n'.join(lines) + '\n'


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are BadInput, without abbreviations of options."""

    def __init__(self, prog, about, **options):
        super().__init__(prog, description=about, allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f'{message}; see --help')


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_command_line(argv=None):
    """(options, flags) of train.py: a namespace of what is no knob, and {knob: value}."""
    parser = Parser(
        'train.py',
        'Train the networks of a settings file and log, at every epoch, each generalization bound.',
        epilog='Several values are a sweep: --depth 3 4 --width 200 600 trains four networks.',
    )
    parser.add_argument('--settings', metavar='FILE', help='settings file, a Python program')
    parser.add_argument(
        '--results-path', metavar='DIR', help='results folder to make, resume, plot or list'
    )
    parser.add_argument(
        '--run', metavar='K', type=int, help='only the K-th network of the sweep, from 1'
    )
    parser.add_argument(
        '--resume', action='store_true', help='continue from the checkpoints in DIR'
    )
    parser.add_argument('--plot', action='store_true', help='draw the figures of DIR')
    parser.add_argument(
        '--status', action='store_true', help='show which networks of DIR are finished'
    )
    parser.add_argument(
        '--prepare', action='store_true', help='check everything and make DIR, train nothing'
    )
    about = comments()
    for name in KNOBS:
        kind = os.path.abspath if name in FOLDERS else _literal  # relative to the current folder
        several = '*' if name == 'milestones' else '+'
        text = about.get(name, '').replace('%', '%%')
        parser.add_argument(
            f'--{name.replace("_", "-")}', nargs=several, type=kind, metavar='X', help=text
        )
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise BadInput(f'unknown argument {unknown[0]}{closest(unknown[0], known)}; see --help')
    flags = {}
    for name in KNOBS:
        values = vars(options).pop(name)
        if values is None:
            continue
        # One value is no sweep; [60, 120] within brackets is one value of milestones.
        single = len(values) == 1 and (name != 'milestones' or isinstance(values[0], list))
        flags[name] = values[0] if single else values
    return options, flags


def run_program(main):
    """The exit status of main(): what it returns, or, each said in one line, 2 for bad input, 1 for
    a failure of the machine, 130 after Ctrl-C.
    """
    for stream in ('stdout', 'stderr'):
        if getattr(sys, stream) is None:  # it was closed, as by >&-
            setattr(sys, stream, open(os.devnull, 'w'))
    program = sys.modules['__main__'].__spec__
    name = program.name.removesuffix('.__main__') if program else 'train.py'
    try:
        return main()
    except BadInput as error:
        status, message = 2, f'error: {error}'
    except OSError as error:
        status, message = 1, f'error: {error}'
    except KeyboardInterrupt:
        status, message = 130, 'stopped'
    except (MemoryError, RuntimeError) as error:
        memory = re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error))
        if not memory and not isinstance(error, MemoryError):
            raise
        advice = 'end other programs that hold memory, or choose a smaller width or batch_size'
        status, message = 1, f'error: not enough memory; {advice}'
    print(f'{name}: {message}', file=sys.stderr)
    return status

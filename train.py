"""Train networks, make them sparse, and log, at every evaluation, what theory says about them.

python train.py                                       the paper's run: CONV-3-200 on MNIST
python train.py --settings conf/digits.py             the quick start, offline and in about a minute
python train.py --depth 3 4 --width 200 600           a sweep of four networks
python train.py --results-path results/7 --resume     go on with what was interrupted
python train.py --results-path results/7 --plot       draw the figures from what is logged so far
python train.py --results-path results/7 --evaluate   measure the weights that were kept anew, with the bounds of today
python train.py --results-path results/7 --status     show which networks are finished
"""

import contextlib
import functools
import os
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -I leaves it out

import sparsify
from conf import BadInput
from datasets import fingerprint
from evaluation import COLUMNS, LAYER_COLUMNS, LOSSES, due, evaluate, evaluate_layers, learning_rate, require_finite
from harness import launch
from harness.machine import Interrupted, check_stop, choose_precision, deferred_stop
from harness.records import (
    csv_line,
    finished,
    load_run,
    parse_line,
    report,
    save_checkpoint,
    write_file,
)
from measures.norms import measure_data
from measures.representations import effective_depth
from models import get_network

TORCH_THREADS = torch.get_num_threads()
captures = SimpleNamespace(failed=False)  # of CUDA graphs: after one that failed, torch's allocator may not begin another




# ----------------------------------------------------------------------------------------------------------------------
# A training step
# ----------------------------------------------------------------------------------------------------------------------


def make_loss(net, loss, images, targets, bf16):
    """The loss of a batch, with its graph: a function of the indices (B,) of its samples."""

    def batch_loss(indices):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            outputs = net(images.index_select(0, indices))
        return loss(outputs.float(), targets.index_select(0, indices))

    return batch_loss


def make_step(optimizer, batch_loss, loss_sum):
    """The training step: a function of the indices (B,) of a batch's samples that adds the batch's loss to loss_sum."""

    def step(indices):
        optimizer.zero_grad()
        value = batch_loss(indices)
        value.backward()
        optimizer.step()
        loss_sum.add_(value.detach())

    return step


def graphed(step, batch_size, device):
    """The training step as a CUDA graph, called as the step is; plain steps where this machine cannot capture one.

    The first steps are plain ones, to set up kernels, workspaces and momentum; so is that of an uneven last batch. All run on
    the stream of the capture, since gradients are accumulated on the stream that they came from. What changes from step to step
    (indices, learning rate, masks) lies in tensors that the graph reads, so it is captured once.
    """
    indices_of_graph = torch.zeros(batch_size, dtype=torch.int64, device=device)
    state = SimpleNamespace(graph=None, plain_steps=0, stream=torch.cuda.Stream())

    def capture():
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=state.stream):
                step(indices_of_graph)
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            captures.failed = True
            reason = str(error.__context__ or error).strip().partition('\n')[0]  # to end a capture that failed fails too
            tqdm.write(f'training goes on without a CUDA graph, which could not be captured: {reason}')
        else:
            state.graph = graph

    def call(indices):
        if state.plain_steps >= 3 and len(indices) == batch_size and state.graph is None and not captures.failed:
            capture()
        if state.graph is not None and len(indices) == batch_size:
            indices_of_graph.copy_(indices)
            state.graph.replay()
            return
        state.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(state.stream):
            step(indices)
        torch.cuda.current_stream().wait_stream(state.stream)
        state.plain_steps += 1

    return call


# ----------------------------------------------------------------------------------------------------------------------
# A training
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """A network in training: what its checkpoint holds (weights, momentum, `state`), and what is fixed around it.

    `state` is the place in the run (the round, the epoch that is under way, its steps done) and all that is logged so far.
    """

    def __init__(self, settings, dataset, folder, device):
        self.settings, self.dataset, self.folder = settings, dataset, folder
        bf16 = choose_precision(settings.precision, device)
        torch.set_num_threads(settings.threads or TORCH_THREADS)
        torch.manual_seed(settings.seed)
        loss, images = LOSSES[settings.loss], dataset.train_images
        targets = F.one_hot(dataset.train_labels, dataset.num_classes).float()
        self.net = get_network(settings, dataset.input_shape, dataset.num_classes).to(device, memory_format=torch.channels_last)
        self.batch_loss = make_loss(self.net, loss, images, targets, bf16)
        rates = {'lr': torch.tensor(settings.lr, device=device), 'momentum': settings.momentum}
        self.optimizer = torch.optim.SGD(self.net.parameters(), **rates, weight_decay=settings.weight_decay, fused=True)
        self.steps = launch.steps_of(settings, dataset)
        self.state = {'round': 0, 'epoch': 0, 'step': 0, 'train_seconds': 0.0}
        self.state |= {'columns': COLUMNS, 'lines': [], 'layer_lines': []}
        self.rewind_to = None  # the network's state after rewind_epoch
        self.place = None  # the round and epoch that the weights are those of, where they are
        self.fingerprint = fingerprint(dataset)
        if (folder / 'model.pt').exists():
            self.restore()
        elif (folder / 'metrics.csv').exists() and (folder / 'metrics.csv').read_bytes().count(b'\n') > 2:
            raise BadInput(f'{folder / "model.pt"}: is missing; put it back, or move {folder} away to train this network anew')
        else:
            sparsify.start(self.net, settings, images, targets, loss)
        self.timed = 0  # steps of this process
        for name, columns, lines in (('metrics', self.state['columns'], 'lines'), ('layers', LAYER_COLUMNS, 'layer_lines')):
            if name == 'metrics' or settings.layers_every:
                write_file(folder / f'{name}.csv', (','.join(columns) + '\n' + ''.join(self.state[lines])).encode())
        self.data = measure_data(self.net, images, skip_uncovered=True)
        self.loss_sum = torch.zeros((), device=device)  # NaN from the first batch on whose loss is
        step = make_step(self.optimizer, self.batch_loss, self.loss_sum)
        self.step = graphed(step, settings.batch_size, device) if device.type == 'cuda' else step

    def restore(self):
        """Puts the checkpoint into the network, its optimizer and the state. Raises BadInput where it does not fit."""
        checkpoint = load_run(self.folder / 'model.pt', self.settings, self.net, self.fingerprint, self.steps)
        torch.set_num_threads(self.settings.threads or checkpoint.get('threads', TORCH_THREADS))
        self.net.load_state_dict(checkpoint['network'])
        for index, weight in enumerate(self.net.parameters()):
            if index in checkpoint['momentum']:
                self.optimizer.state[weight] = checkpoint['momentum'][index]
        self.state |= {name: checkpoint['state'][name] for name in self.state}
        self.rewind_to, self.place = checkpoint.get('rewind_to'), checkpoint.get('place')
        place = f'epoch {self.state["epoch"]} after {self.state["step"]} of its {self.steps} steps'
        place = f'round {self.state["round"]}, {place}' if self.settings.prune_rounds else place
        print(f'{self.settings.name}: {"finished already" if self.finished() else f"goes on in {place}"}', flush=True)

    def finished(self):
        return finished(self.settings, [parse_line(line, self.state['columns']) for line in self.state['lines'][-3:]])

    def train_epoch(self, bar):
        """The steps of the epoch that is under way, from where it is."""
        epoch, start = self.state['epoch'], time.perf_counter()
        self.net.train()
        self.optimizer.param_groups[0]['lr'].fill_(learning_rate(self.settings, epoch))
        m, device = len(self.dataset.train_images), self.loss_sum.device
        order = torch.from_numpy(np.random.default_rng((self.settings.seed, epoch)).permutation(m)).to(device)
        try:
            for indices in order.split(self.settings.batch_size)[self.state['step'] :]:
                check_stop()
                self.place = None
                number, steps = (epoch - 1) * self.steps + self.state['step'], self.settings.epochs * self.steps
                regrows = sparsify.regrow_due(self.settings, number, steps)
                if not regrows or self.settings.regrow == 'random':  # RigL's update takes the place of the gradient step
                    self.step(indices)
                if regrows:
                    loss = functools.partial(self.batch_loss, indices)
                    sparsify.regrow(self.net, self.optimizer, self.settings, number, steps, loss)
                self.state['step'] += 1
                bar.update()
                self.say_pace(start)
            require_finite(self.loss_sum, *self.net.state_dict().values())  # waits for the device
        finally:
            self.state['train_seconds'] += time.perf_counter() - start

    def say_pace(self, start):
        """Once in a process, after 20 steps, if epochs are long: how long."""
        self.timed += 1
        seconds = (time.perf_counter() - start) / 20 * self.steps
        if self.timed == 20 and seconds > 60:
            tqdm.write(f'{self.settings.name}: an epoch takes about {seconds:.0f} s of training')

    def prune(self):
        """Kills weights of the trained network, as the round says."""
        sparsify.prune(self.net, self.settings, self.state['round'], self.dataset.input_shape)
        self.state['step'], self.place = 1, None  # done, should an interrupt come before its row is logged

    def evaluate(self):
        """The row of metrics.csv and the rows of layers.csv that are due after this epoch: either may be none."""
        settings, place = self.settings, (self.state['round'], self.state['epoch'])
        row, layers = None, []
        if due(place[1], settings.eval_every, settings.epochs):
            row = evaluate(self.net, settings, self.dataset, self.data, *place)
            row |= {'train_seconds': self.state['train_seconds']}
        if due(place[1], settings.layers_every, settings.epochs):
            layers = evaluate_layers(self.net, self.dataset, *place)
        return row, layers

    def log(self, row, layers, bar):
        """Appends rows to metrics.csv and layers.csv, says the first aloud, and keeps a snapshot where one is due."""
        settings, place = self.settings, [self.state['round'], self.state['epoch']]
        for name, key, new, columns in (
            ('metrics.csv', 'lines', [row] if row else [], self.state['columns']),
            ('layers.csv', 'layer_lines', layers, LAYER_COLUMNS),
        ):
            lines = [csv_line(one, columns) for one in new]
            self.state[key] += lines
            with open(self.folder / name, 'a') if lines else contextlib.nullcontext() as file:
                file and file.writelines(lines)
        if due(place[1], settings.snapshot_every, settings.epochs):
            (self.folder / 'snapshots').mkdir(exist_ok=True)
            snapshot = {'network': self.net.state_dict(), 'place': place}
            save_checkpoint(self.folder / 'snapshots' / f'{place[0]}-{place[1]}.pt', snapshot)
        self.place = place
        if layers and place[1] == settings.epochs:
            errors = [layer['train_ncc_error'] for layer in layers[1:-1]]
            depths = ', '.join(f'{effective_depth(errors, eps):g} (eps = {eps})' for eps in (0.01, 0.05))
            accuracy = f'training accuracy {1 - row["train_error"]:.4f}'
            tqdm.write(f'{settings.name}: effective depth {depths}; {accuracy}')
        if row:
            self.state['train_seconds'] = 0.0
            where = f'{settings.name} ' + f'round {place[0]} ' * bool(settings.prune_rounds)
            if bar.disable:
                print(f'{where}epoch {place[1]}/{settings.epochs} lr {row["lr"]:g} {report(row)}', flush=True)
            else:
                bar.set_postfix_str(report(row, shutil.get_terminal_size().columns - len(settings.name) - 58))

    def advance(self):
        """On to the next epoch; after the last one to the next round, and after pruning back to the epoch of the rewinding."""
        settings, state = self.settings, self.state
        if settings.prune_rounds and [state['round'], state['epoch']] == [0, settings.rewind_epoch]:
            self.rewind_to = {name: value.clone() for name, value in self.net.state_dict().items()}
        if state['round'] > 0 and state['epoch'] == 0:
            sparsify.rewind(self.net, self.optimizer, self.rewind_to)
            self.place = None
            state['epoch'] = max(settings.rewind_epoch, 0) + 1
        elif state['epoch'] == settings.epochs and state['round'] < settings.prune_rounds:
            state['round'], state['epoch'] = state['round'] + 1, 0
        else:
            state['epoch'] += 1
        state['step'] = 0

    def save(self):
        require_finite(self.loss_sum, *self.net.state_dict().values())
        saved = {'settings': vars(self.settings), 'data': self.fingerprint, 'threads': torch.get_num_threads()}
        saved |= {'network': self.net.state_dict(), 'momentum': self.optimizer.state_dict()['state'], 'state': self.state}
        save_checkpoint(self.folder / 'model.pt', saved | {'place': self.place, 'rewind_to': self.rewind_to})


def progress_bar(run):
    """One line that fills up, on a terminal; it counts steps and shows epochs."""
    settings, state = run.settings, run.state
    round_epochs = settings.epochs - max(settings.rewind_epoch, 0)
    behind = state['round'] * settings.epochs - max(0, state['round'] - 1) * (settings.epochs - round_epochs)
    behind += max(0, state['epoch'] - 1 - (settings.epochs - round_epochs) * (state['round'] > 0))
    return tqdm(
        desc=settings.name,
        total=(settings.epochs + settings.prune_rounds * round_epochs) * run.steps,
        initial=behind * run.steps + state['step'],
        unit_scale=1 / run.steps,
        bar_format='{desc} {percentage:3.0f}%|{bar:10}| epoch {n:.2f}/{total:.0f} [{elapsed}<{remaining}]{postfix}',
        dynamic_ncols=True,
        disable=not sys.stdout.isatty(),
    )


def train(settings, dataset, folder, device):
    """Trains one network to its last epoch, from its checkpoint in `folder` where there is one, logging as it goes.

    Raises:
        BadInput: the checkpoint is missing, damaged or of other settings.
        Interrupted: after a checkpoint was written.
        Diverged: the last good checkpoint is kept.
        OSError: the results cannot be written; the last checkpoint is kept.
    """
    run = Run(settings, dataset, folder, device)
    with progress_bar(run) as bar, deferred_stop():
        try:
            while not run.finished():
                if run.state['epoch'] > 0:
                    run.train_epoch(bar)
                elif run.state['round'] > 0 and run.state['step'] == 0:
                    run.prune()
                run.log(*run.evaluate(), bar)
                run.advance()
                if run.place is None or run.place[1] % settings.checkpoint_every == 0 or run.finished():
                    run.save()
        except Interrupted:
            run.save()
            raise


if __name__ == '__main__':
    sys.exit(launch.main(train))

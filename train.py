"""Train networks, make them sparse, and log, at every evaluation, what theory says about them.

python train.py                                       the paper's run: CONV-3-200 on MNIST
python train.py --settings conf/digits.py             the quick start, offline and in about a minute
python train.py --depth 3 4 --width 200 600           a sweep of four networks
python train.py --results-path results/7 --resume     go on with what was interrupted
python train.py --results-path results/7 --plot       draw the figures from what is logged so far
python train.py --results-path results/7 --evaluate   measure the weights that were kept anew, with the bounds of today
python train.py --results-path results/7 --status     show which networks are finished
"""

import signal
import sys

if __name__ == '__main__':
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # while torch is imported, Ctrl-C ends the program without a traceback

import math
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import launch
import sparsify
from conf import BadInput, Interrupted
from datasets import VARIANTS, crops, fingerprint
from device import check_stop, choose_precision, deferred_stop, graphed
from evaluation import (
    COLUMNS,
    LAYER_COLUMNS,
    LOSSES,
    at_target,
    certifies,
    due,
    evaluate,
    evaluate_layers,
    finished,
    initial_network,
    last_epoch,
    learning_rate,
    new_network,
    report,
    require_finite,
    schedule,
    stopped_early,
    training_loss,
)
from measures.norms import measure_data
from measures.representations import effective_depth
from pace import heartbeat, progress_bar, say_pace
from records import (
    append_lines,
    cells_of,
    csv_line,
    line_of,
    load_run,
    parse_line,
    save_checkpoint,
    write_table,
)
from utils import BOUNDS

TORCH_THREADS = torch.get_num_threads()


def step_of(run):
    """The training step of a run, a function of the indices (B,) of the batch's samples."""

    def step(indices):
        run.optimizer.zero_grad()
        loss = run.loss(run.net, indices)
        loss.backward()
        run.optimizer.step()
        run.loss_sum.add_(loss.detach())

    return step


def train(settings, dataset, folder, device):
    """Trains one network to its last epoch, from its checkpoint in `folder` where there is one, logging as it goes.

    Raises:
        BadInput: the checkpoint is missing, damaged or of other settings.
        Interrupted: after a checkpoint was written.
        Diverged: the last good checkpoint is kept.
        OSError: the results cannot be written; the last checkpoint is kept.
    """
    run = Run(settings, dataset, folder, device)
    step = step_of(run)
    if device.type == 'cuda':
        step = graphed(
            step, settings.batch_size, device
        )  # the same five lines, captured once and replayed
    say_pace(run)
    try:
        with progress_bar(run) as bar:
            for round_, epoch in run.places():
                if epoch == 0 and round_ > 0:
                    run.prune(round_)
                elif epoch > 0:
                    for number, indices in run.batches(epoch):
                        regrows = sparsify.regrow_due(settings, number, settings.epochs * run.steps)
                        if (
                            not regrows or settings.regrow == 'random'
                        ):  # RigL's update takes the place of the gradient step
                            step(indices)
                        if regrows:
                            run.regrow(number, indices)
                        bar.update()
                row, layers = run.evaluate(round_, epoch, bar)
                with deferred_stop():
                    run.log(row, layers, bar)
                    run.advance()
                    if (
                        not run.place
                        or due(run.place[1], settings.checkpoint_every)
                        or run.finished()
                    ):
                        run.save()
    except Interrupted:
        run.save()
        raise


class Run:
    """A network in training: what its checkpoint holds (weights, momentum, `state`), and what is fixed around it.

    `state` is the place in the schedule that is under way, with the steps of its epoch that are done, and all that is logged.
    """

    def __init__(self, settings, dataset, folder, device):
        self.settings, self.dataset, self.folder = settings, dataset, folder
        self.bf16 = choose_precision(settings.precision, device)
        torch.set_num_threads(settings.threads or TORCH_THREADS)
        self.targets = F.one_hot(dataset.train_labels, dataset.num_classes).float()
        resumed = (folder / 'model.pt').exists()
        self.net = (new_network if resumed else initial_network)(settings, dataset)
        rates = {'lr': torch.tensor(settings.lr, device=device), 'momentum': settings.momentum}
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), **rates, weight_decay=settings.weight_decay, fused=True
        )
        self.loss_sum = torch.zeros((), device=device)  # NaN from the first batch on whose loss is
        self.steps = launch.steps_of(settings, dataset)
        self.state = {
            'round': 0,
            'epoch': 0,
            'step': 0,
            'train_loss': math.inf,
            'train_seconds': 0.0,
        }
        self.state |= {
            'columns': COLUMNS,
            'lines': [],
            'layer_columns': LAYER_COLUMNS,
            'layer_lines': [],
            'certificates': {},
        }
        # Of all that is drawn in a step, as by dropout: set anew in each, so that a resumed run draws the same.
        self.generator = (
            torch.cuda.default_generators[device.index]
            if device.type == 'cuda'
            else torch.default_generator
        )
        self.rewind_to = None  # the network's state after rewind_epoch
        self.place = None  # the round and epoch that the weights are those of, where they are
        self.fingerprint = fingerprint(dataset)
        if resumed:
            self.restore()
        elif (folder / 'metrics.csv').exists() and (folder / 'metrics.csv').read_bytes().count(
            b'\n'
        ) > 2:
            mend = f'put it back, or move {folder} away to train this network anew'
            raise BadInput(f'{folder / "model.pt"}: is missing; {mend}')
        self.data = measure_data(self.net, dataset.train_images, skip_uncovered=True)
        if self.state['lines'] and not self.finished():
            self.measure_start_again()
        for name, columns, lines in self.tables():
            if name == 'metrics.csv' or settings.layers_every:
                write_table(folder / name, columns, lines)

    def restore(self):
        """Puts the checkpoint into the network, its optimizer and the state. Raises BadInput where it does not fit."""
        checkpoint = load_run(
            self.folder / 'model.pt', self.settings, self.net, self.fingerprint, self.steps
        )
        torch.set_num_threads(self.settings.threads or checkpoint.get('threads', TORCH_THREADS))
        self.net.load_state_dict(checkpoint['network'])
        for index, weight in enumerate(self.net.parameters()):
            if index in checkpoint['momentum']:
                self.optimizer.state[weight] = checkpoint['momentum'][index]
        self.state |= {name: checkpoint['state'][name] for name in self.state}
        self.rewind_to, self.place = checkpoint.get('rewind_to'), checkpoint.get('place')
        place = f'epoch {self.state["epoch"]} after {self.state["step"]} of its {self.steps} steps'
        place = f'round {self.state["round"]}, {place}' if self.settings.prune_rounds else place
        print(
            f'{self.settings.name}: {"finished already" if self.finished() else f"goes on in {place}"}',
            flush=True,
        )

    def measure_start_again(self):
        """Says which bounds have changed, in whatever part, since the first row, that of the network before training.

        A bound that came since gets its cell in that row.
        """
        net, first = (
            initial_network(self.settings, self.dataset),
            cells_of(self.state['lines'][0], self.state['columns']),
        )
        now = evaluate(net, self.settings, self.dataset, self.data, 0, 0)
        if not math.isclose(float(first['train_loss'] or 'nan'), now['train_loss'], rel_tol=1e-4):
            return  # another version of the program, or of torch, began with other weights: nothing can be compared
        known = [name for name in BOUNDS if first.get(name)]
        changed = [
            name for name in known if not math.isclose(float(first[name]), now[name], rel_tol=1e-6)
        ]
        first |= {
            name: str(now[name])
            for name in BOUNDS
            if name not in known and not math.isnan(now[name])
        }
        self.state['lines'][0] = line_of(first, self.state['columns'])
        if changed:
            mend = '--evaluate measures anew those whose weights there are'
            words = f'{", ".join(changed)}: not the function that rows so far are of; {mend}'
            print(f'{self.settings.name}: {words}', flush=True)

    def tables(self):
        """(file, columns, lines) of the two tables of the log."""
        metrics = 'metrics.csv', self.state['columns'], self.state['lines']
        return metrics, ('layers.csv', self.state['layer_columns'], self.state['layer_lines'])

    def newest_rows(self):
        return [parse_line(line, self.state['columns']) for line in self.state['lines'][-3:]]

    def finished(self):
        return next(self.places(), None) is None

    def places(self):
        """What is left of the schedule: the (round, epoch) under way and those after it, until the run is stopped early."""
        for place in schedule(self.settings):
            if place >= (self.state['round'], self.state['epoch']) and not finished(
                self.settings, self.newest_rows()
            ):
                yield place

    def loss(self, net, indices):
        """The loss of a network on the training samples with these indices (B,), with its graph.

        With augment = 'crop' the indices are those of `batches`: of all crops of all training images.
        """
        m, augment = len(self.targets), self.settings.augment == 'crop'
        samples = indices % m if augment else indices
        images, targets = (
            part.index_select(0, samples) for part in (self.dataset.train_images, self.targets)
        )
        images = crops(images, indices // m) if augment else images
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = net(images)
        return LOSSES[self.settings.loss](outputs.float(), targets)

    def batches(self, epoch):
        """Yields the training steps that an epoch has left, as (number in the whole training, indices of the samples).

        With augment = 'crop' sample i of m is i + m v, where v is the variant of it that this epoch trains on: a batch is
        one tensor of indices all the same, which a CUDA graph reads. A signal waits for the end of the step.
        """
        start, m = time.perf_counter(), len(self.dataset.train_images)
        self.net.train()
        self.optimizer.param_groups[0]['lr'].fill_(learning_rate(self.settings, epoch))
        chance = np.random.default_rng((self.settings.seed, epoch))
        order = chance.permutation(m)
        if self.settings.augment == 'crop':
            order += m * chance.integers(VARIANTS, size=m)
        order = torch.from_numpy(order).to(self.loss_sum.device)
        try:
            with deferred_stop():
                for indices in order.split(self.settings.batch_size)[self.state['step'] :]:
                    check_stop()
                    if at_target(self.settings, self.state['train_loss']):
                        break
                    self.place, number = None, (epoch - 1) * self.steps + self.state['step']
                    self.generator.manual_seed(
                        hash((self.settings.seed, number))
                    )  # of integers: the same everywhere
                    yield number, indices
                    self.state['step'] += 1
                    self.watch_target()
                require_finite(
                    self.loss_sum, *self.net.state_dict().values()
                )  # waits for the device
        finally:
            self.state['train_seconds'] += time.perf_counter() - start

    def watch_target(self):
        """Takes the training loss where `target_loss` asks for it: after each epoch; near the target, each eighth of one."""
        target, step = self.settings.target_loss, self.state['step']
        near = self.state['train_loss'] < 4 * target
        if target and (step == self.steps or (near and step % -(-self.steps // 8) == 0)):
            self.state['train_loss'] = training_loss(self.net, self.settings, self.dataset)
            self.net.train()

    def last_epoch(self):
        return last_epoch(self.settings, self.state['epoch'], self.state['train_loss'])

    def prune(self, round_):
        """Removes weights of the trained network, unless an interrupt came after that and before its row was logged."""
        with deferred_stop():
            if self.state['step'] == 0:
                sparsify.prune(self.net, self.settings, round_, self.dataset.input_shape)
                self.state |= {'step': 1, 'train_loss': math.inf}
                self.place = None

    def regrow(self, number, indices):
        steps = self.settings.epochs * self.steps
        sparsify.regrow(
            self.net,
            self.optimizer,
            self.settings,
            number,
            steps,
            lambda: self.loss(self.net, indices),
        )

    def evaluate(self, round_, epoch, bar):
        """The row of metrics.csv and the rows of layers.csv that are due at this place: either may be none."""
        settings, last, row, layers = self.settings, self.last_epoch(), None, []
        doing = 'certifying' if certifies(settings, round_, epoch, last) else 'evaluating'

        def beat(seconds):
            if bar.disable:
                print(
                    f'{settings.name} epoch {epoch}/{settings.epochs}: {doing} for {seconds:.0f} s',
                    flush=True,
                )
            else:
                bar.set_postfix_str(f'{doing} {seconds:.0f} s')

        with heartbeat(beat, 30 if bar.disable else 1):
            if due(epoch, settings.eval_every, last):
                found = self.state['certificates']  # before this evaluation was stopped
                row = evaluate(
                    self.net, settings, self.dataset, self.data, round_, epoch, certificates=found
                )
                row |= {'train_seconds': self.state['train_seconds']}
            if due(epoch, settings.layers_every, last):
                layers = evaluate_layers(
                    self.net, self.dataset, round_, epoch, probes=epoch == last
                )
        return row, layers

    def log(self, row, layers, bar):
        """Appends rows to the tables, prints the first, and keeps a snapshot where one is due."""
        settings, place = self.settings, [self.state['round'], self.state['epoch']]
        for (name, columns, lines), rows in zip(self.tables(), ([row] if row else [], layers)):
            new = [csv_line(cells, columns) for cells in rows]
            lines += new
            append_lines(self.folder / name, new)
        self.place = place
        if due(place[1], settings.snapshot_every, self.last_epoch()):
            (self.folder / 'snapshots').mkdir(exist_ok=True)
            snapshot = {'network': self.net.state_dict(), 'place': place}
            save_checkpoint(
                self.folder / 'snapshots' / f'{place[0]}-{place[1]}.pt', snapshot | self.origin()
            )
        if layers and place[1] == self.last_epoch():
            errors = [layer['train_ncc_error'] for layer in layers[1:-1]]
            depths = ', '.join(
                f'{effective_depth(errors, eps):g} (eps = {eps})' for eps in (0.01, 0.05)
            )
            tqdm.write(
                f'{settings.name}: effective depth {depths}; training accuracy {1 - row["train_error"]:.4f}'
            )
        if row:
            self.state |= {
                'train_seconds': 0.0,
                'train_loss': row['train_loss'],
                'certificates': {},
            }
            where = f'{settings.name} ' + f'round {place[0]} ' * bool(settings.prune_rounds)
            where += f'epoch {place[1]}/{settings.epochs} '
            if bar.disable:
                print(f'{where}{report(row, 120 - len(where))}', flush=True)
            else:
                bar.set_postfix_str(
                    report(row, shutil.get_terminal_size().columns - len(settings.name) - 58)
                )
            if reason := stopped_early(settings, self.newest_rows()):
                tqdm.write(f'{settings.name}: {reason}')

    def advance(self):
        """On to the next place of the schedule; rewinds the weights behind the row of a pruned network."""
        settings, state = self.settings, self.state
        here = state['round'], state['epoch']
        if settings.prune_rounds and here == (0, settings.rewind_epoch):
            self.rewind_to = {name: value.clone() for name, value in self.net.state_dict().items()}
        if state['round'] > 0 and state['epoch'] == 0:
            sparsify.rewind(self.net, self.optimizer, self.rewind_to)
            self.place, state['train_loss'] = None, math.inf
        last = here[1] > 0 and here[1] == self.last_epoch()
        end = (here[0], here[1] + 1)  # behind the last place, from which a longer run goes on
        later = (
            place
            for place in schedule(settings)
            if place > here and not (last and place[0] == here[0])
        )
        state['round'], state['epoch'] = next(later, end)
        state['step'] = 0

    def save(self):
        require_finite(self.loss_sum, *self.net.state_dict().values())
        saved = self.origin() | {
            'threads': torch.get_num_threads(),
            'network': self.net.state_dict(),
        }
        saved |= {'momentum': self.optimizer.state_dict()['state'], 'state': self.state}
        save_checkpoint(
            self.folder / 'model.pt', saved | {'place': self.place, 'rewind_to': self.rewind_to}
        )

    def origin(self):
        """What a file of weights says of where they come from."""
        return {'settings': vars(self.settings), 'data': self.fingerprint}


if __name__ == '__main__':
    sys.exit(launch.main(train))

"""The forward pass of a network as a list of steps: linear maps, activations and poolings.

Covered are Conv2d and ConvTranspose2d (padded with zeros), Linear, batch normalization, ReLU,
LeakyReLU of a slope in [0, 1], max and average pooling, means over all positions, nearest and
bilinear upsampling, Flatten, additions and concatenations. Whatever else a network does is refused
by its name, all of it at once.

`walk` is the only walk of a network: the path-norms, the chains of measures/trace.py and the
question which layer reads which channels are views of its steps.
"""

import contextlib
import contextvars
import operator
from collections import Counter, namedtuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from conf import BadInput

RELUS = (torch.relu, torch.relu_, F.relu, 'relu', 'relu_')
FLATTENS = (torch.flatten, 'flatten')
MEANS = (torch.mean, 'mean')
# What a traced x.size(0) or x.shape[0] consists of.
SIZES = ('size', 'shape', getattr, operator.getitem)

# The ops of layers with weights, and of what maps the rows and columns of each channel, with their
# attributes.
_LAYERS = {
    nn.Conv2d: ('conv', 'stride', 'padding', 'dilation', 'groups'),
    nn.ConvTranspose2d: ('transposed', 'stride', 'padding', 'output_padding', 'groups', 'dilation'),
    nn.Linear: ('linear',),
}
LAYERS = tuple(op for op, *_ in _LAYERS.values())
LAYER_TYPES = tuple(_LAYERS)
_MAPS = {
    nn.MaxPool2d: ('max', F.max_pool2d, 'kernel_size', 'stride', 'padding', 'dilation',
                   'ceil_mode'),
    nn.AvgPool2d: ('mean', F.avg_pool2d, 'kernel_size', 'stride', 'padding', 'ceil_mode',
                   'count_include_pad', 'divisor_override'),
    nn.AdaptiveAvgPool2d: ('mean', F.adaptive_avg_pool2d, 'output_size'),
    nn.Upsample: ('mean', F.interpolate, 'size', 'scale_factor', 'mode', 'align_corners',
                  'recompute_scale_factor'),
}  # fmt: skip
# Options of these modules, with the values that are covered.
_OPTIONS = {
    'padding_mode': ('zeros',),
    'mode': ('nearest', 'nearest-exact', 'bilinear'),
    'return_indices': (False,),
}
_FUNCTIONS = {
    torch.max_pool2d: nn.MaxPool2d,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.interpolate: nn.Upsample,
    F.leaky_relu: nn.LeakyReLU,
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, 'add', 'add_')
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_PASSED = (nn.Identity, nn.Dropout, nn.Dropout2d)
# Not covered, but known to keep channels in their order.
_PER_CHANNEL_MODULES = (
    nn.PReLU,
    nn.ReLU6,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.AdaptiveMaxPool2d,
)
_PER_CHANNEL_FUNCTIONS = (
    F.relu6,
    F.elu,
    F.gelu,
    F.silu,
    F.softplus,
    torch.tanh,
    torch.sigmoid,
    'tanh',
    'sigmoid',
    operator.mul,
    operator.truediv,
)
_PATHS = (
    'paths go through convolutions, transposed too, Linear, BatchNorm, ReLU, LeakyReLU, Flatten, '
    'pooling, means, upsampling, and sums and concatenations of what is computed from the input'
)
COMPUTES_WEIGHTS = (
    ' has forward hooks of torch.nn.utils, which compute its weights: pass it after '
    'remove_weight_norm, prune.remove, ..., or use torch.nn.utils.parametrizations'
)
_LAZY = ' waits for its first image; pass one through the network first'
_WRAPPERS = nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel
_NO_STATISTICS = ' keeps no running statistics; it depends on the batch, which is not covered'

_traced = contextvars.ContextVar('traced', default=None)  # {network: its trace} in `traced_once`


class NotCovered(BadInput, AttributeError):
    """The theory does not cover a network, or a table has no such measure for that reason; its text
    says why.

    It is an AttributeError too, so that hasattr(table, 'rho') is False where rho is not measured.
    """


class Step(
    namedtuple('Step', 'name op inputs module obstacle weight bias norm', defaults=(None,) * 5)
):
    """A step of the forward pass.

    `name` and `module` (None: a function) name its part of the network; `op` says what the step
    does, as a tuple that two networks of the same structure share; `inputs` are the indices of the
    steps that it reads; `obstacle` is why it is not covered, or None. `forward_steps` adds weight
    and bias, float64 copies with batch normalization folded in, and `norm`, the name of the batch
    norm.
    """

    @property
    def what(self):
        """What names the step in a refusal."""
        return named(self.name, self.module)


def refuse(net, obstacles, covered):
    """Raises NotCovered where there are obstacles, pairs (what, reason), and names all of them."""
    if obstacles:
        raise NotCovered(f'{type(net).__name__}: {_listed(obstacles)}; {covered}')


def _listed(obstacles):
    """Obstacles (what, reason) in one line, grouped by reason."""
    reasons = {}
    for what, reason in obstacles:
        reasons.setdefault(reason, {})[what] = None
    return '; '.join(', '.join(names) + reason for reason, names in reasons.items())


def named(name, module):
    """The name of a module with its type, for a refusal; of a function its name."""
    if module is None:
        return name
    kind = type(module).__name__
    return f'{name} ({kind})' if name else kind


def require_values(net):
    """Refuses a network with weights that have no values, by the names of all such modules."""
    obstacles = []
    for name, module in net.named_modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if any(map(is_lazy, tensors)):
            obstacles.append((named(name, module), _LAZY))
        elif any(tensor is not None and tensor.is_meta for tensor in tensors):
            obstacles.append((named(name, module), ' is on the meta device'))
    refuse(net, obstacles, 'its weights have no values')


@contextlib.contextmanager
def evaluation_mode(net, values=True):
    """Runs what it encloses in evaluation mode, and leaves each module in the mode it was in.

    Unless `values` is False, a network whose weights have none is refused.
    """
    if values:
        require_values(net)
    training = [module for module in net.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --------------------------------------------------------------------------------------------------
# The traced graph
# --------------------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """A symbol on which += is seen to work in place."""

    def __iadd__(self, other):
        return self.tracer.create_proxy('call_function', operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, module, name):
        return isinstance(module, LAYER_TYPES) or super().is_leaf_module(module, name)


@contextlib.contextmanager
def traced_once():
    """Traces each network once in what it encloses or decorates; modules must not change there."""
    token = _traced.set({})
    try:
        yield
    finally:
        _traced.reset(token)


def trace(net):
    """The forward pass of a network as a list of (fx.Node, module or None, what it is in words),
    the output's node last.

    A view or reshape to (N, -1) is traced as a flattening, and so is one to (N, a number), with
    meta['fixed']. The third entry names the node in a refusal.

    Raises:
        NotCovered: it cannot be traced, or what a module computes is not what its type says; all of
            these are named.
    """
    known = _traced.get()
    if known is None:
        return _trace(net)
    if net not in known:
        known[net] = _trace(net)
    return known[net]


def _trace(net):
    kind = type(net).__name__
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise NotCovered(
            'global forward hooks (register_module_forward_hook) can change what modules compute; '
            'remove them'
        )
    obstacles = []
    for name, module in net.named_modules():
        # What is traced are the classes of the network and of the modules that it is made of.
        fixed = module is net or _Tracer().is_leaf_module(module, name)
        reason = _module_obstacle(module, fixed)
        if reason:
            obstacles.append((named(name, module), reason))
    if obstacles:
        raise NotCovered(_listed(obstacles))
    try:
        # What is measured is the network in evaluation mode.
        with evaluation_mode(net, values=False), _undone(net):
            graph = _Tracer().trace(net)
    except Exception as error:  # whatever the network's own code raises when it is run on symbols
        reason = str(error).partition('\n')[0]
        raise NotCovered(f'{kind}: its forward pass cannot be traced ({reason})') from None
    # Backwards, so that the users of a node come before it: a size that only a view read goes with
    # the view.
    for node in reversed(graph.nodes):
        shape = viewed_as(node)
        if _is_batch_by_rest(shape):
            node.op, node.target, node.args = 'call_method', 'flatten', (node.args[0], 1)
            node.meta['fixed'] = shape[1] != -1
        elif node.op != 'call_module' and node.target in SIZES and not node.users:
            graph.erase_node(node)
    traced = []
    for position, node in enumerate(graph.nodes):
        node.meta['position'] = position
        module = net.get_submodule(node.target) if node.op == 'call_module' else None
        traced.append((node, module, f'{kind}: {named(_name(node), module)}'))
    return traced


@contextlib.contextmanager
def _undone(net):
    """Undoes what a network does to itself and to the random numbers in a forward pass.

    On symbols its own code would keep symbols, and its buffers are counted up in place.
    """
    kept = [values for module in net.modules() for values in (vars(module), module._buffers)]
    before = [dict(values) for values in kept]
    for module in net.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.clone()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for values, old in zip(kept, before):
            values.clear()
            values.update(old)


def _name(node):
    return getattr(node.target, '__name__', node.target)


def _module_obstacle(module, fixed):
    """Why a module may compute something else than what is traced of it, or None."""
    if isinstance(module, _WRAPPERS):
        return ' is a wrapper: pass the network in it, its .module'
    if compiled(module):
        return compiled(module)
    if any(map(is_lazy, module._parameters.values())):
        return _LAZY
    if any(part is not None and part.is_complex() for part in module._parameters.values()):
        return ' has complex weights, which are not covered'
    if quantized(module):
        return ' has quantized weights, which are not covered'
    if computes_weights(module):
        return COMPUTES_WEIGHTS
    if _hooks(module):
        return ' has forward hooks, which can change what it computes; remove them'
    own = 'forward' in vars(module) or '_conv_forward' in vars(module)
    for kind in LAYER_TYPES:
        if isinstance(module, kind):
            own |= type(module).forward is not kind.forward
            convolves = getattr(type(module), '_conv_forward', None)
            own |= convolves is not getattr(kind, '_conv_forward', None)
    if own and fixed:
        return ' has a forward pass of its own, which is not covered'
    return None


def quantized(module):
    """Whether a module holds quantized weights: a method gives them, they are no parameters."""
    return callable(getattr(type(module), 'weight', None))


def compiled(module):
    """Why a module runs without its parts, as a compiled one does, or None."""
    if hasattr(module, '_orig_mod'):
        return (
            ' is a compiled network: pass the one that was given to torch.compile, its ._orig_mod'
        )
    if isinstance(module, torch.jit.ScriptModule):
        return ' is a jit module: pass the nn.Module that it was made from'
    return None


def _hooks(module):
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def computes_weights(module):
    """Whether forward hooks of torch.nn.utils compute a module's weights, as those of pruning."""
    return any(type(hook).__module__.startswith('torch.nn.utils') for hook in _hooks(module))


def viewed_as(node):
    """The shape to which a traced node views or reshapes, () where it does something else."""
    if node.op == 'call_module' or node.target not in ('view', 'reshape', torch.reshape):
        return ()
    shape = node.args[1:]
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def _is_batch_by_rest(shape):
    """Whether a traced shape is (number of samples, -1), or (number of samples, a number)."""
    if len(shape) != 2 or not isinstance(shape[1], int) or not isinstance(shape[0], fx.Node):
        return False
    size = shape[0]
    if size.target is operator.getitem and size.args[1] == 0:
        size = size.args[0]
        if size.target is getattr:
            return size.args[1] == 'shape'
        return size.target == 'size' and len(size.args) == 1
    return size.target == 'size' and size.args[1:] == (0,)


def flattens(node, module):
    """The dimensions (first, last) that a traced node flattens, or None if it is no flattening."""
    if isinstance(module, nn.Flatten):
        return module.start_dim, module.end_dim
    if node.op == 'call_module' or node.target not in FLATTENS:
        return None
    return _argument(node, 1, 'start_dim', 0), _argument(node, 2, 'end_dim', -1)


def averages(node):
    """Whether a traced node is the mean over all positions of maps, the dimensions 2 and 3."""
    if node.op == 'call_module' or node.target not in MEANS:
        return False
    return _argument(node, 1, 'dim', None) in ([2, 3], (2, 3), [-2, -1], (-2, -1))


def rectifies(node, module):
    """Whether a traced node is a ReLU."""
    return isinstance(module, nn.ReLU) or (node.op != 'call_module' and node.target in RELUS)


def _argument(node, position, name, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# --------------------------------------------------------------------------------------------------
# The steps
# --------------------------------------------------------------------------------------------------


def walk(net):
    """The structure of a network's forward pass in evaluation mode: Steps without weights.

    The first step is the input, the last one the output. What changes nothing is no step, and a
    mean over all positions is two, an average pooling and a flattening. What is not covered is a
    step with an obstacle.

    Raises:
        NotCovered: as `trace`.
    """
    steps, index = [], {}  # index: node -> the step that computes it
    for node, module, _ in trace(net):
        ops, reads, obstacle = _understood(node, module, first=not steps)
        inputs = tuple(index[read] for read in reads)
        for op in ops:
            steps.append(Step(_name(node), op, inputs, module, obstacle))
            inputs = (len(steps) - 1,)
        index[node] = inputs[0]
    return steps


def forward_steps(net):
    """The forward pass in evaluation mode as a list of Step with weights; its result is the last.

    Raises:
        NotCovered: for whatever is not covered, by name.
        BadInput: weights with NaN or infinity.
    """
    require_values(net)
    steps = walk(net)
    refuse(net, [(step.what, step.obstacle) for step in steps if step.obstacle], _PATHS)
    return read_weights(net, steps)


@torch.no_grad()
def read_weights(net, steps):
    """The steps of `walk`, none with an obstacle, with their weights, and without the output."""
    readers = Counter(number for step in steps for number in step.inputs)
    read, index = [], []  # index: the number in `read` of each step of `steps`
    with evaluation_mode(net, values=False):
        for step in steps[:-1]:
            inputs = tuple(index[number] for number in step.inputs)
            if step.op[0] in LAYERS:
                weight, bias = _doubles(step.what, step.module.weight, step.module.bias)
                step = step._replace(weight=weight, bias=bias)
            elif step.op[0] == 'diagonal':
                weight, bias = folded_norm(step.module, step.what)
                step = step._replace(weight=weight, bias=bias, norm=step.name)
                # A layer that only the batch norm reads takes it in.
                front = steps[step.inputs[0]]
                if readers[step.inputs[0]] == 1 and _normalizes(step.module, front):
                    read[inputs[0]] = _fold(read[inputs[0]], step)
                    index.append(inputs[0])
                    continue
            index.append(len(read))
            read.append(step._replace(inputs=inputs))
    return read


def _normalizes(norm, layer):
    """Whether a batch norm normalizes the channels that a layer makes."""
    maps = ('conv', 'transposed') if isinstance(norm, nn.BatchNorm2d) else ('linear',)
    return layer.op[0] in maps


def _fold(layer, norm):
    """A layer's step with the batch norm of another step folded in."""
    weight, bias = layer.weight * per_channel(norm.weight, layer), norm.bias
    if layer.bias is not None:
        bias = bias + norm.weight * layer.bias
    return layer._replace(weight=weight, bias=bias, norm=norm.name)


def _doubles(what, *tensors):
    """Float64 copies of tensors, or of None, which must be finite (`meta` has shapes only)."""
    copies = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.detach().to(torch.float64, copy=True)
            if not (tensor.is_meta or tensor.isfinite().all()):
                raise BadInput(f'{what}: its weights contain NaN or infinity')
        copies.append(tensor)
    return copies


def folded_norm(norm, what):
    """Batch normalization with running statistics as x -> weight * x + bias."""
    if norm.running_mean is None:
        raise NotCovered(what + _NO_STATISTICS)
    scale, shift = (norm.weight, norm.bias) if norm.affine else (1, 0)
    weight = scale * (norm.running_var.double() + norm.eps).rsqrt()
    return _doubles(what, weight, shift - weight * norm.running_mean)


def _understood(node, module, first):
    """(ops of its steps, nodes that it reads, obstacle or None) of a traced node."""
    try:
        ops = _ops(node, module, first)
        kind = ops[0][0] if ops else None
        if kind in ('input', 'output'):
            return ops, node.all_input_nodes, None
        reads = [*node.args[:1]]
        if kind == 'add':
            reads = [*node.args]
        if kind == 'cat':
            reads = [*_argument(node, 0, 'tensors', ())]
        if {*reads} != {*node.all_input_nodes} or (module and (len(node.args) > 1 or node.kwargs)):
            raise NotCovered(
                ': called with more than its input, or by keyword, which is not covered'
            )
        if not node.users:
            raise NotCovered(': its output is not used, which is not covered')
        if ops and _in_place(node, module) and _is_read_later(reads[0], node):
            raise NotCovered(' works in place on a value that is used elsewhere too; not covered')
        node.meta['view'] = not ops or ops[0][0] == 'flatten'
        return ops, reads, None
    except NotCovered as error:
        keeps = isinstance(module, _PER_CHANNEL_MODULES)
        if module is None:
            keeps = node.target in _PER_CHANNEL_FUNCTIONS and len(node.all_input_nodes) == 1
        op = ('per channel',) if keeps else ('unknown',)
        return [op], node.all_input_nodes, str(error)


def _is_read_later(value, node):
    """Whether a value is read after a node, itself or under the name of a view."""
    while value.meta.get('view'):
        (value,) = value.all_input_nodes
    names = [value]
    for name in names:  # it grows
        names += [user for user in name.users if user.meta.get('view')]
        if any(user.meta['position'] > node.meta['position'] for user in name.users):
            return True
    return False


def _in_place(node, module):
    if getattr(module, 'inplace', False) or node.kwargs.get('inplace', False):
        return True
    return node.target is operator.iadd or (module is None and _name(node).endswith('_'))


def _ops(node, module, first):
    """What a node does, as a list of `op` of a Step. Raises NotCovered with the reason."""
    if node.op == 'placeholder' and first:
        return [('input',)]
    if node.op == 'output':
        if not isinstance(node.args[0], fx.Node):
            raise NotCovered(" is not the last layer's, which is not covered")
        return [('output',)]
    if node.op == 'call_function' and node.target in _FUNCTIONS:
        options = dict(node.kwargs)
        if options.pop('antialias', False):
            raise NotCovered(': antialias is not covered')
        module = _FUNCTIONS[node.target](*node.args[1:], **options)
    for kind, (op, *how) in (_LAYERS | _MAPS).items():
        if isinstance(module, kind):
            for option, covered in _OPTIONS.items():
                value = getattr(module, option, covered[0])
                if value not in covered:
                    only = ', '.join(map(str, covered))
                    raise NotCovered(f': {option} = {value!r} is not covered, only {only}')
            how = [getattr(module, what) if isinstance(what, str) else what for what in how]
            return [(op, *how)]
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        if module.running_mean is None:
            raise NotCovered(_NO_STATISTICS)
        return [('diagonal',)]
    if rectifies(node, module):
        return [('relu', 0)]
    if isinstance(module, nn.LeakyReLU):
        if not 0 <= module.negative_slope <= 1:
            raise NotCovered(': only slopes between 0 and 1 are covered')
        return [('relu', module.negative_slope)]
    dims = flattens(node, module)
    if dims:
        if dims[0] < 1:
            raise NotCovered(f': a flattening from dimension {dims[0]} on is not covered')
        return [('flatten', *dims)]
    if isinstance(module, _PASSED):
        return []
    if node.target is F.dropout and not _argument(node, 2, 'training', True):
        return []
    if node.op in ('call_function', 'call_method'):
        return _operation(node)
    raise NotCovered(': not covered')


def _operation(node):
    """The `op`s of a function or method of values: sums, concatenations, means."""
    values = [isinstance(argument, fx.Node) for argument in node.args]
    if node.target in _ADDITIONS and values == [True, True] and not node.kwargs:
        return [('add',)]
    if node.target in _CONCATENATIONS and {*node.kwargs} <= {'tensors', 'dim'}:
        return [('cat', _argument(node, 1, 'dim', 0))]
    if node.target in MEANS and {*node.kwargs} <= {'dim', 'keepdim'}:
        if not averages(node):
            raise NotCovered(': only a mean over all positions, the dimensions 2 and 3, is covered')
        pooling = ('mean', F.adaptive_avg_pool2d, 1)
        keeps = _argument(node, 2, 'keepdim', False)
        return [pooling] if keeps else [pooling, ('flatten', 1, -1)]
    if node.target in SIZES:
        raise NotCovered(': a shape or a part of a value is not covered; write sizes as numbers')
    raise NotCovered(': not covered')


# --------------------------------------------------------------------------------------------------
# Channels
# --------------------------------------------------------------------------------------------------


def per_channel(factor, layer, incoming=False):
    """A factor for each channel that a layer makes, or that it reads, in the shape of its weights.

    The channels that a convolution makes lie along axis 0 of its weights, and those that it reads,
    of one group, along axis 1; of a transposed convolution it is the other way round. A linear
    layer after a flattening reads a channel at several positions.
    """
    rows, columns, *kernel = layer.weight.shape
    if incoming == (layer.op[0] == 'transposed'):
        return factor.view(-1, 1, *[1] * len(kernel))
    groups = _groups(layer)
    factor = factor.view(groups, -1)
    factor = factor.repeat_interleave(columns // factor.shape[1], 1)
    factor = factor.repeat_interleave(rows // groups, 0)
    return factor.view(*factor.shape, *[1] * len(kernel))


def channels(layer):
    """How many channels a layer makes."""
    if layer.op[0] == 'transposed':
        return layer.weight.shape[1] * _groups(layer)
    return len(layer.weight)


def _groups(layer):
    return 1 if layer.op[0] == 'linear' else layer.op[4]


def channel_readers(steps, index):
    """Who reads the channels that the layer of this index makes.

    Returns:
        (passed, readers): the steps through which the channels go, each on its own, and the layers
        that read them, as lists
        of indices. None where their order is lost on the way: in a concatenation, a flattening or
        pooling that mixes them, a layer that reads another dimension, or a step that is not known.
    """
    flat = {index: steps[index].op[0] == 'linear'}  # of each step that carries the channels
    passed, readers = [], []
    for number, step in enumerate(steps):  # in the order of the forward pass: one pass finds all
        sources = [source for source in step.inputs if source in flat]
        if not sources:
            continue
        kind, *how = step.op
        is_flat = flat[sources[0]]
        if kind in LAYERS:
            if is_flat != (kind == 'linear'):
                return None
            readers.append(number)
            continue
        if kind in ('cat', 'unknown') or (is_flat and kind in ('max', 'mean', 'flatten')):
            return None
        if kind == 'flatten' and how not in ([1, -1], [1, 3]):
            return None
        flat[number] = is_flat or kind == 'flatten'
        passed.append(number)
    return passed, readers

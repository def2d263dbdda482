"""Networks that several tests use."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def conv(*arguments, bias=False, **options):
    """A convolution, without a bias as a rule."""
    return nn.Conv2d(*arguments, bias=bias, **options)


def linear(*arguments, bias=False):
    """A linear layer, without a bias as a rule."""
    return nn.Linear(*arguments, bias=bias)


def weights_of(net):
    """The weights of all layers that have some, in their order."""
    return [module.weight for module in net.modules() if isinstance(module, WEIGHTED)]


def randomized(*layers, seed=0):
    """The nn.Sequential of some modules in float64 and evaluation mode, all its numbers drawn."""
    net = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(len(tensor), generator=generator))
            module.running_var.uniform_(0.1, 3, generator=generator)
        elif isinstance(module, WEIGHTED):
            for parameter in module.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return net


class Forward(nn.Module):
    """A network whose forward pass is the function given, of the network and its input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


class Residual(nn.Module):
    """What modules read, plus what they make of it."""

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


class Beside(nn.Module):
    """What modules read, and beside it what they make of it, as at the way up of a U-net."""

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


class Functional(nn.Module):
    """A bias-free chain in another style: functions in place of modules."""

    def __init__(self):
        super().__init__()
        self.first = conv(1, 4, 3, stride=2, padding=1)
        self.hidden = linear(4 * 4 * 4, 7)
        self.last = linear(7, 10)

    def forward(self, x):
        x = torch.flatten(F.relu(self.first(x)), 1)
        return self.last(self.hidden(x).relu())


class Block(nn.Module):
    """The basic block of a residual network, as torchvision writes it."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network of small widths, as torchvision writes it."""

    def __init__(self, *widths):
        super().__init__()
        self.conv1, self.bn1 = conv(3, widths[0], 7, 2, 3), nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        pairs = zip((widths[0], *widths), widths)
        blocks = [Block(before, width, 1 + (before != width)) for before, width in pairs]
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(widths[-1], 5)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class UNet(nn.Module):
    """A U-net of the smallest kind in float64, its k-th parameter sin(k)."""

    def __init__(self, up):
        super().__init__()
        self.enc = nn.Conv2d(1, 2, 3, padding=1)
        self.mid = nn.Conv2d(2, 2, 3, padding=1)
        self.up, self.act, self.pool = up, nn.LeakyReLU(0.2), nn.AvgPool2d(2)
        self.out = nn.Conv2d(4, 1, 3, padding=1)
        self.double()
        count = sum(number.numel() for number in self.parameters())
        self.set_numbers(torch.arange(1, count + 1).double().sin())

    def numbers(self):
        """All parameters as one vector."""
        return nn.utils.parameters_to_vector(self.parameters()).detach()

    def set_numbers(self, vector):
        nn.utils.vector_to_parameters(vector, self.parameters())

    def forward(self, x):
        skip = self.act(self.enc(x))
        return self.out(torch.cat([skip, self.up(self.act(self.mid(self.pool(skip))))], 1))


class Transformer(nn.Module):
    """A transformer block on the rows of an image as tokens, and a classifier."""

    def __init__(self, tokens, width, classes):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.fc, self.act, self.out = nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)
        self.head = nn.Linear(tokens * width, classes)

    def forward(self, x):
        x = x.flatten(1, 2)
        x = self.norm(x + self.attn(x, x, x)[0])
        return self.head((x + self.out(self.act(self.fc(x)))).flatten(1))


# ------------------------------------------------------------------------------------------------
# A bench: one network of each kind, of three classes
# ------------------------------------------------------------------------------------------------

BENCH_SHAPE = (1, 6, 4)


def small_chain(relus=(nn.ReLU, nn.ReLU)):
    first, second = (make() for make in relus)
    return nn.Sequential(
        *(conv(1, 2, 2), first, conv(2, 2, 2), second, nn.Flatten(), linear(16, 3)),
    )


def parametrized(wrap):
    """A chain whose layers are parametrized."""
    return nn.Sequential(wrap(conv(1, 2, 2)), nn.ReLU(), nn.Flatten(), wrap(linear(30, 3)))


def tied():
    """A Parameter in two linear layers."""
    layers = [linear(24, 4), linear(4, 4), linear(4, 4), linear(4, 3)]
    layers[2].weight = layers[1].weight
    modules = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *modules[:-1])


def without_channels():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # there is nothing to initialize
        layers = nn.Linear(24, 4), nn.ReLU(), nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3)
    nn.init.normal_(layers[-1].bias)
    return nn.Sequential(nn.Flatten(), *layers)


def one_relu():
    relu = nn.ReLU()
    return small_chain([lambda: relu, lambda: relu])


BENCH = {
    'VGG': lambda: nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(2, 3)),
    ),
    'residual': lambda: nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU()),
        Residual(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)),
    ),
    'MLP': lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(24, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
    ),
    'U-net': lambda: nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()),
        Beside(
            *(nn.MaxPool2d(2), nn.Conv2d(2, 2, 1), nn.ReLU()),
            nn.ConvTranspose2d(2, 2, 2, stride=2),
        ),
        nn.Conv2d(4, 3, 1),
    ),
    'transformer': lambda: Transformer(6, 4, 3),
    'tied': tied,
    'spectral norm': lambda: parametrized(parametrizations.spectral_norm),
    'weight norm': lambda: parametrized(parametrizations.weight_norm),
    'float16': lambda: small_chain().half(),
    'bfloat16': lambda: small_chain().bfloat16(),
    'float64': lambda: small_chain().double(),
    'nested': lambda: nn.Sequential(
        nn.Sequential(nn.Sequential(conv(1, 2, 2)), nn.ReLU()),
        nn.Sequential(nn.Sequential(), nn.Flatten(), linear(30, 4)),
        *(nn.ReLU(), nn.Sequential(linear(4, 3))),
    ),
    'one ReLU': one_relu,
    'no channels': without_channels,
}


def bench(name, seed=0):
    """A network of BENCH in training mode; batch normalization has statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = BENCH[name]()
        for module in net.modules():
            if isinstance(module, BATCH_NORMS):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.train()

"""Networks that several tests use."""

import torch
import torch.nn.functional as F
from torch import nn

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

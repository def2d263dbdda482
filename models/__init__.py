"""The networks. Adding one is one file here and one entry in NETWORKS."""

from conf import BadInput, closest
from models.convbn import convbn, convres
from models.convnet import convnet
from models.mlp import mlp
from models.weight_norm import add_masks

# the setting `network` -> function of (settings, input_shape, num_classes)
NETWORKS = {'CONV': convnet, 'MLP': mlp, 'CONVBN': convbn, 'CONVRES': convres}


def get_network(settings, input_shape, num_classes):
    """The network that the settings describe, with all-ones masks where a setting can prune.

    Args:
        settings: namespace with the knobs of conf/global_settings.py.
        input_shape: (channels, height, width) of an image.
        num_classes: number of outputs.
    Returns:
        An nn.Module from images (N, *input_shape) to outputs (N, num_classes).
    Raises:
        BadInput: unknown network, one too deep for the image, or one that needs another
            normalization.
    """
    if settings.network not in NETWORKS:
        hint = closest(settings.network, NETWORKS)
        names = ', '.join(NETWORKS)
        raise BadInput(f'network = {settings.network!r}: must be one of {names}{hint}')
    net = NETWORKS[settings.network](settings, input_shape, num_classes)
    add_masks(net, settings)
    return net

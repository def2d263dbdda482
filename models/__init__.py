"""The networks. Adding one is one file here and one entry in NETWORKS."""

from conf import BadInput, closest
from models.convnet_wn import convnet

NETWORKS = {'CONV': convnet}  # the setting `network` -> function of (settings, input_shape, num_classes)


def get_network(settings, input_shape, num_classes):
    """The network that the settings describe.

    Args:
        settings: namespace with the knobs of conf/global_settings.py.
        input_shape: (channels, height, width) of an image.
        num_classes: number of outputs.
    Returns:
        An nn.Module from images (N, *input_shape) to outputs (N, num_classes).
    Raises:
        BadInput: unknown network, or one that is too deep for the image.
    """
    if settings.network not in NETWORKS:
        hint = closest(settings.network, NETWORKS)
        raise BadInput(f'network = {settings.network!r}: must be one of {", ".join(NETWORKS)}{hint}')
    return NETWORKS[settings.network](settings, input_shape, num_classes)

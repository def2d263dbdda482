"""Certificate E: an upper bound of any classifier's error, by its disagreement with a coded one."""

from fractions import Fraction
from typing import NamedTuple

import torch

from conf import BadInput
from measures.norms import classification_margins
from measures.tails import exact_binomial_inverse
from measures.trace import outputs
from studies.coded.message import Proof, is_largest, prove, scores


class Disagreement(NamedTuple):
    """The bound of the error of f is proof.bound, of g, plus share, of P(f != g)."""

    bound: Fraction
    proof: Proof
    share: Fraction
    differ: int  # images on which f and g differ


@torch.no_grad()
def certify_by_disagreement(net, message, images, labels, held_out, delta=0.001):
    """An upper bound of the true error of any network f, from a message and unlabelled images.

    err(f) <= err(g) + P(f != g) for the network g of the message. Theorem D of docs/coded.md bounds
    err(g) with probability 1 - delta / 2. The number of held-out images on which f and g differ is
    binomial given the sample, so its exact upper limit bounds P(f != g) with probability
    1 - delta / 2 (Bazinet, Zantedeschi, Germain 2026, "Bound to Disagree"). The bound holds with
    probability 1 - delta for one f and one g. The held-out images must be i.i.d., independent of
    the sample, and not looked at when f, its recipe or g was chosen. f is the function that `net`
    computes in evaluation mode, here, a fixed number of images at a time.

    Args:
        net: any classifier of images with pixels from 0 to 1: biases, batch normalization, ...
        message: bytes.
        images, labels: the i.i.d. sample that the message is proven on, as `prove` takes it.
        held_out: (n, C, H, W); a tie of f or of g counts as a difference.
    Raises:
        BadInput: as `prove`; or f and g do not fit.
    """
    found = outputs(net, held_out)
    if found.dim() != 2:
        raise BadInput(f'outputs of shape {tuple(found.shape)}: must be (images, classes)')
    half = Fraction(str(delta)) / 2
    proof = prove(message, images, labels, found.shape[1], half)
    coded_scores = scores(proof.code, held_out)
    predicted = coded_scores.argmax(1)
    agree = is_largest(coded_scores, predicted) & (classification_margins(found, predicted) > 0)
    differ = len(held_out) - int(agree.sum())
    share = exact_binomial_inverse(differ, len(held_out), half)
    return Disagreement(min(Fraction(1), proof.bound + share), proof, share, differ)

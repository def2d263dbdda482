"""Upper limits of an error rate from a sample: tails of the binomial distribution, inverted.

K ~ Bin(m, p) is the number of errors on m independent samples, p the true error rate.
"""

import math
from fractions import Fraction

import torch

from conf import BadInput


def kl_inverse(q, a):
    """sup {p in [q, 1]: kl(q|p) <= a}, the upper end of 60 bisections.

    kl is the divergence of two Bernoulli variables with means q and p.
    """
    if not (0 <= q <= 1 and a >= 0):
        raise BadInput(f'q = {q}, a = {a}: q must be an error between 0 and 1, and a at least 0')
    low, high = q, 1.0
    for _ in range(60):
        p = (low + high) / 2
        kl = math.inf
        if p < 1:
            # log1p keeps the digits of a small divergence, where p is close to q.
            kl = (1 - q) * math.log1p((p - q) / (1 - p))
            if q > 0:
                kl -= q * math.log1p((p - q) / q)
        if kl <= a:
            low = p
        else:
            high = p
    return high


def test_set_bound(error, n, delta):
    """An upper bound of the true error with probability 1 - delta, from n samples not trained on.

    kl_inverse(error, log(1 / delta) / n): Chernoff's bound, inverted (Langford 2005, theorem 3.3).
    """
    if not (n >= 1 and 0 < delta < 1):
        raise BadInput(f'n = {n}, delta = {delta}: n must be at least 1, delta between 0 and 1')
    return kl_inverse(error, math.log(1 / delta) / n)


def binomial_inverse(errors, m, log_eta):
    """sup {p in [0, 1]: P(Bin(m, p) <= errors) >= eta} from ln eta, the end of 100 bisections.

    In float64, whose rounding it does not cover; `exact_binomial_inverse` does.
    """
    if not (0 <= errors <= m and m >= 1 and log_eta <= 0):
        raise BadInput(
            f'{errors} errors of {m}, ln eta = {log_eta:g}: must be 0 to m errors, eta at most 1'
        )
    if errors == m:
        return 1.0
    k = torch.arange(errors + 1, dtype=torch.float64)
    choose = math.lgamma(m + 1) - torch.lgamma(k + 1) - torch.lgamma(m - k + 1)
    low, high = errors / m, 1.0
    for _ in range(100):
        p = (low + high) / 2
        if p == 0:
            tail = 0.0
        elif p == 1:
            tail = -math.inf
        else:
            terms = choose + k * math.log(p) + (m - k) * math.log1p(-p)
            tail = torch.logsumexp(terms, 0).item()
        if tail >= log_eta:
            low = p
        else:
            high = p
    return high


def exact_binomial_inverse(errors, m, eta, parts=10**6):
    """The least multiple p of 1 / parts, a Fraction, with P(Bin(m, p) <= errors) < eta, or 1.

    It is proven in integers; floats only say where to look first. Every p' with
    P(Bin(m, p') <= errors) >= eta is below p, since the probability falls as p' grows.

    Args:
        eta: a Fraction above 0.
    """
    if not (0 <= errors <= m and m >= 1 and 0 < eta <= 1):
        raise BadInput(f'{errors} errors of {m}: must be 0 to m errors, eta above 0 and at most 1')
    if errors == m:
        return Fraction(1)

    def is_bound(a):
        """Whether P(Bin(m, a / parts) <= errors) < eta, in integers."""
        if a == parts:
            return True
        tail = _scaled_tail(errors, m, a, parts - a)
        return tail * eta.denominator < eta.numerator * parts**m

    log_eta = math.log(eta.numerator) - math.log(eta.denominator)
    a = min(parts, max(1, math.ceil(parts * binomial_inverse(errors, m, log_eta))))
    while not is_bound(a):
        a += 1
    while a > 1 and is_bound(a - 1):
        a -= 1
    return Fraction(a, parts)


def _scaled_tail(k, m, a, b):
    """(a + b)^m P(Bin(m, a / (a + b)) <= k), an integer, for k < m and integers a, b above 0."""
    if 2 * k >= m:  # the other tail has fewer terms
        return (a + b) ** m - _scaled_tail(m - k - 1, m, b, a)
    # The sum over j of C(m, j) a^j b^(m - j), with b^(m - k) taken out; each division is exact.
    term = total = b**k
    for j in range(k):
        term = term * ((m - j) * a) // ((j + 1) * b)
        total += term
    return total * b ** (m - k)

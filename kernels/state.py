"""The rows of `state`, the running sums of a walk, by name: for the kernels, their launches and plain torch alike."""

from torch import Tensor

# reference m that the exponentials are relative to: the largest z where more than their sum is taken; else at most 20
# nats below it, or at most 60 from it where a GEMM wrote them
REF = 0
SUM = 1  # sum of exp(z - m) over v != y
TARGET = 2  # x of the target; NaN while no slice has held it, so a label outside the vocabulary ends as NaN
SUM_ZE = 3  # sum of (z - m) exp(z - m) over v != y
SUM_Z = 4  # sum of z over every v
SUM_EE = 5  # sum of exp(z - m)^2 over v != y
TOP = 6  # largest z over v != y
# the same of exp(z - m) as rounded for U, whose weights its inverse makes add up to 1; with a softcap SUM
ROUNDED = 7
# sum of (z - m - c) exp(z - m) as rounded for U2, c the mean of z - m over v != y: what rounding leaves of 0; with a
# softcap 0
ROUNDED_ZE = 8
STATE_ROWS = 9
# rows of the `state` of a KL: maxima and sums of exponentials (in the backward their logarithms) of policy and
# reference, and the sum of exp(z_ref - max) (z_ref - z)
KL_TOP, KL_SUM, KL_REF_TOP, KL_REF_SUM, KL_GAP = range(5)
KL_ROWS = 5
LOWEST = -1e30  # finite stand-in for -inf, so that differences of maxima and references are never NaN


def rest_mean(total: Tensor, weighted: Tensor) -> Tensor:
    """The mean of z - m over v != y from sums of exp(z - m) and of (z - m) exp(z - m); 0 where there is no such v."""
    return (weighted / total).where(total != 0, 0)

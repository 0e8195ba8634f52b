"""Small device functions shared by the kernels; no libdevice, so that they also run in Triton's interpreter."""

import triton
import triton.language as tl

from . import state

# as kernels may name them
SUM, TARGET, SUM_ZE, SUM_Z, SUM_EE, TOP = (
    tl.constexpr(value) for value in (state.SUM, state.TARGET, state.SUM_ZE, state.SUM_Z, state.SUM_EE, state.TOP)
)
ROUNDED, ROUNDED_ZE = tl.constexpr(state.ROUNDED), tl.constexpr(state.ROUNDED_ZE)
LOWEST = tl.constexpr(state.LOWEST)
KL_SUM, KL_REF_TOP, KL_REF_SUM, KL_GAP = (
    tl.constexpr(value) for value in (state.KL_SUM, state.KL_REF_TOP, state.KL_REF_SUM, state.KL_GAP)
)


@triton.jit
def softcap_logit(x, cap):
    """cap tanh(x), by the series of tanh below 0.1, where 1 - exp(-2|x|) would cancel."""
    e = tl.exp(-2 * tl.abs(x))
    magnitude = (1 - e) / (1 + e)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15)))
    return cap * tl.where(square < 0.01, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def sech2(x):
    """1 - tanh(x)^2 from exp(-2|x|): no cancellation where tanh saturates."""
    e = tl.exp(-2 * tl.abs(x))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def sigmoid64(x):
    """1 / (1 + exp(-x)) in fp64, without overflow and with full relative precision on both sides."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def log_sigmoid64(x):
    """min(x, 0) - log1p(exp(-|x|)) in fp64; log1p(e) as e log(1 + e) / ((1 + e) - 1), exact for small e."""
    e = tl.exp(-tl.abs(x))
    one_e = 1 + e
    exact = one_e == 1
    log1p = tl.where(exact, e, tl.log(one_e) * e / tl.where(exact, 1.0, one_e - 1))
    return tl.where(x < 0, x, 0.0) - log1p

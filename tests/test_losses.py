"""The plain losses: a case to compute by eye for each, derivatives, extremes, signs, stationary points, identities."""

import inspect
from functools import partial
from math import exp, log

import mpmath  # torch's own
import pytest
import torch

import alignloss
from alignloss import losses
from alignloss.losses import LOSSES


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + exp(-x))


def nls(x):  # -log sigmoid
    return -log(sigmoid(x))


def call(name, data, **options):
    """A loss with the data that its signature names."""
    fn = LOSSES[name]
    names = [p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return fn(*(data[n] for n in names), **options)


# log-ratios: chosen -10 - -12 = 2, rejected -11 - -10 = -1; with beta = 0.5 rewards 1 and -0.5, margin 1.5
PAIR = {
    "chosen_logps": t(-10),
    "rejected_logps": t(-11),
    "ref_chosen_logps": t(-12),
    "ref_rejected_logps": t(-10),
    "chosen_lengths": t(4),
    "rejected_lengths": t(2),
    "chosen_scores": t(3),
    "rejected_scores": t(1),
    "chosen_seq_kl": t(0.4),
    "rejected_seq_kl": t(1.0),
}
# rewards 1 and -0.5 again
TWO = {
    "logps": t(-10, -11),
    "ref_logps": t(-12, -10),
    "lengths": t(4, 2),
    "desirable": torch.tensor([True, False]),
    "kl": t(0.8)[0],
    "delta": t(0.4)[0],
}
q = sigmoid(1.5)
# name: options, losses, chosen reward, rejected reward
BY_EYE = {
    "dpo": ({"beta": 0.5, "label_smoothing": 0.1}, 0.9 * nls(1.5) + 0.1 * nls(-1.5), 1, -0.5),
    "robust_dpo": ({"beta": 0.5, "label_smoothing": 0.1}, (0.9 * nls(1.5) - 0.1 * nls(-1.5)) / 0.8, 1, -0.5),
    "length_normalized_dpo": ({"beta": 0.5}, nls(1 / 4 - -0.5 / 2), 0.25, -0.25),
    "r_dpo": ({"beta": 0.5, "length_weight": 0.1}, nls(1.5 + 0.1 * (4 - 2)), 1, -0.5),
    "irpo": ({"beta": 0.5, "nll_weight": 0.2}, nls(1.5) + 0.2 * 10 / 4, 1, -0.5),
    "dpop": ({"beta": 0.5, "penalty_weight": 5.0}, nls(1.5 - 5 * 0), 1, -0.5),
    "odpo": ({"beta": 0.5, "offset_weight": 0.7}, nls(1.5 - 0.7 * log(3 - 1)), 1, -0.5),
    "dpo_shift": ({"beta": 0.5, "rejected_scale": 0.8}, nls(1 - 0.8 * -0.5), 1, -0.5),
    "f_dpo": (
        {"beta": 0.5, "divergence": losses.forward_kl},
        nls(0.5 * -exp(-2) - 0.5 * -exp(1)),
        -0.5 * exp(-2),
        -0.5 * exp(1),
    ),
    "chi_po": (
        {"beta": 0.5},
        nls(0.5 * (exp(2) + 2) - 0.5 * (exp(-1) - 1)),
        0.5 * (exp(2) + 2),
        0.5 * (exp(-1) - 1),
    ),
    "discopop": ({"beta": 0.5, "tau": 0.5}, (1 - sigmoid(3)) * nls(1.5) + sigmoid(3) * exp(-1.5), 1, -0.5),
    # one pair: the sorted margins are its own, -10 - -11 = 1 and -12 - -10 = -2
    "aot": ({"beta": 0.5}, nls(0.5 * (1 - -2)), 1, -0.5),
    "aot_unpaired": ({"beta": 0.5, "label_smoothing": 0.1}, 0.9 * nls(1.5) + 0.1 * nls(-1.5), 1, -0.5),
    "tdpo1": ({"beta": 0.5}, nls(1.5 - 0.5 * (1.0 - 0.4)), 1, -0.5),
    "tdpo2": ({"beta": 0.5, "kl_weight": 0.3}, nls(1.5 - 0.3 * 0.5 * (1.0 - 0.4)), 1, -0.5),
    # per token: 2 / 4 and -1 / 2; target 1 / (2 * 0.25) = 2
    "ipo": ({"beta": 0.25}, (1 - 2) ** 2, 0.5, -0.25),
    "ipo_sum": ({"beta": 0.25}, (3 - 2) ** 2, 0.5, -0.25),
    "hinge": ({"beta": 0.2}, 1 - 0.2 * 3, 0.4, -0.2),
    "exo": ({"beta": 0.5, "epsilon": 0.1}, q * log(q / 0.9) + (1 - q) * log((1 - q) / 0.1), 1, -0.5),
    "nca": ({"beta": 0.5}, nls(1) + nls(-1) / 2 + nls(0.5) / 2, 1, -0.5),
    "sppo": ({"beta": 0.25}, (2 - 2) ** 2 + (-1 + 2) ** 2, 0.5, -0.25),
    "apo_zero": ({"beta": 0.5}, 1 - sigmoid(1) + sigmoid(-0.5), 1, -0.5),
    "apo_down": ({"beta": 0.5}, sigmoid(1) + 1 - sigmoid(1.5), 1, -0.5),
    "bco_pair": ({"beta": 0.5}, nls(1) + nls(0.5), 1, -0.5),
    "cal_dpo": ({"beta": 0.25}, nls(3) + (2 - 2) ** 2 + (-1 + 2) ** 2, 0.5, -0.25),
    "rebel": ({"beta": 0.5}, (1.5 - (3 - 1)) ** 2, 1, -0.5),
    "cpo": ({"beta": 0.5, "label_smoothing": 0.1}, 0.9 * nls(0.5) + 0.1 * nls(-0.5), -5, -5.5),
    "cpo_hinge": ({"beta": 0.5}, 1 - 0.5 * 1, -5, -5.5),
    # per token: -10 / 4 = -2.5 and -11 / 2 = -5.5
    "cpo_ipo": ({"beta": 0.5}, (3 - 1) ** 2, -1.25, -2.75),
    "simpo": ({"beta": 0.5, "gamma": 0.3}, nls(0.5 * 3 - 0.3), -1.25, -2.75),
    "alphapo": (
        {"beta": 0.5, "gamma": 0.3, "alpha": 0.25},
        nls(2 * (1 - exp(0.625)) - 2 * (1 - exp(1.375)) - 0.3),
        2 * (1 - exp(0.625)),
        2 * (1 - exp(1.375)),
    ),
    "orpo": (
        {"beta": 0.5},
        0.5 * nls(log(exp(-2.5) / (1 - exp(-2.5))) - log(exp(-5.5) / (1 - exp(-5.5)))),
        -1.25,
        -2.75,
    ),
    "slic": ({"delta": 3.0}, 3 - 1, -10, -11),
    "simper": ({}, exp(-5.5) - exp(-2.5), exp(-2.5), exp(-5.5)),
}
# name: options, losses, rewards
UNPAIRED_BY_EYE = {
    "kto": (
        {"beta": 0.5, "desirable_weight": 2.0},
        [2 * (1 - sigmoid(1 - 0.5 * 0.8)), 1 - sigmoid(-(-0.5 - 0.5 * 0.8))],
        [1, -0.5],
    ),
    "apo_zero_unpaired": ({"beta": 0.5}, [1 - sigmoid(1), sigmoid(-0.5)], [1, -0.5]),
    "bco": ({"beta": 0.5}, [nls(1 - 0.4), nls(-(-0.5 - 0.4))], [1, -0.5]),
    "npo": ({"beta": 0.5}, [4 * log(1 + exp(1)), 4 * log(1 + exp(-0.5))], [1, -0.5]),
    "sft": ({}, [10, 11], [0, 0]),
}


@pytest.mark.parametrize("name", BY_EYE)
def test_by_eye(name):
    options, value, chosen, rejected = BY_EYE[name]
    got = call(name, PAIR, **options)
    assert [x.item() for x in got] == pytest.approx([value, chosen, rejected], rel=1e-12)


@pytest.mark.parametrize("name", UNPAIRED_BY_EYE)
def test_unpaired_by_eye(name):
    options, values, rewards = UNPAIRED_BY_EYE[name]
    got = call(name, TWO, **options)
    assert got[0].tolist() == pytest.approx(values, rel=1e-12)
    assert got[1].tolist() == pytest.approx(rewards, rel=1e-12)


def test_the_table_names_every_loss_and_every_loss_has_a_case():
    assert list(LOSSES) == [fn.__name__.removesuffix("_loss") for fn in LOSSES.values()]
    assert set(LOSSES) == set(BY_EYE) | set(UNPAIRED_BY_EYE)
    assert {f"{name}_loss" for name in LOSSES} <= set(losses.__all__)


def test_aot_compares_what_has_the_same_rank():
    data = {
        "chosen_logps": t(-1, -5),
        "rejected_logps": t(-2, -1),  # margins 1, -4
        "ref_chosen_logps": t(-9, -2),
        "ref_rejected_logps": t(-6, -9),  # margins -3, 7
    }
    # sorted: -4, 1 against -3, 7: the first pair has rank 2, the second rank 1
    assert call("aot", data, beta=0.5)[0].tolist() == pytest.approx([nls(0.5 * (1 - 7)), nls(0.5 * (-4 - -3))])
    # log-ratios: chosen 8, -3; rejected 4, 8
    assert call("aot_unpaired", data, beta=0.5)[0].tolist() == pytest.approx([nls(0.5 * (8 - 8)), nls(0.5 * (-3 - 4))])


def test_dpop_penalises_a_chosen_sequence_below_the_reference():
    below = PAIR | {"ref_chosen_logps": t(-9)}  # log-ratios -1 and -1: margin 0, penalty 5 * 0.5 * 1
    assert call("dpop", below, beta=0.5, penalty_weight=5.0)[0].item() == pytest.approx(nls(-2.5))


def test_kto_and_bco_detach_their_baselines_and_refuse_labels_between_0_and_1():
    baseline = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    logps = t(-3).requires_grad_()
    kto, _ = losses.kto_loss(logps, t(-3), torch.tensor([True]), baseline, beta=0.1)
    bco, _ = losses.bco_loss(logps, t(-3), torch.tensor([True]), baseline, beta=0.1)
    (kto + bco).sum().backward()
    assert kto.item() == pytest.approx(0.5)  # clamped at 0
    assert baseline.grad is None
    assert losses.kto_loss(t(-3), t(-3), t(0.5), t(0)[0], beta=0.1)[0].isnan().all()


OPTIONS = {name: options for name, (options, *_) in (BY_EYE | UNPAIRED_BY_EYE).items()}
TRAINED = ("logps", "chosen_logps", "rejected_logps", "chosen_seq_kl", "rejected_seq_kl")


def random_data(B=4, scale=3.0):
    data = {name: torch.randn(B, dtype=torch.float64) * scale - 12 for name in PAIR if name.endswith("logps")}
    data |= {name: torch.randn(B, dtype=torch.float64) * scale - 12 for name in ("logps", "ref_logps")}
    data |= {name: torch.randint(1, 9, (B,)).double() for name in ("chosen_lengths", "rejected_lengths", "lengths")}
    data |= {name: torch.rand(B, dtype=torch.float64) for name in ("chosen_seq_kl", "rejected_seq_kl", "delta", "kl")}
    scores = torch.rand(B, dtype=torch.float64)
    return data | {"chosen_scores": scores + 2, "rejected_scores": scores, "desirable": torch.arange(B) % 2 == 0}


def differentiable(name, data):
    names = [n for n in inspect.signature(LOSSES[name]).parameters if n in TRAINED]
    return names if name != "tdpo2" else [n for n in names if n != "chosen_seq_kl"]


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_values_unreduced_and_rewards_detached(name):
    data = random_data()
    names = differentiable(name, data)
    leaves = [data[n].clone().requires_grad_() for n in names]

    def values(*tensors):
        return call(name, data | dict(zip(names, tensors, strict=True)), **OPTIONS[name])[0]

    assert torch.autograd.gradcheck(values, leaves)
    value, *rewards = call(name, data | dict(zip(names, leaves, strict=True)), **OPTIONS[name])
    assert value.shape == (4,)
    assert len(rewards) == (1 if "logps" in names else 2)
    assert all(r.shape == (4,) and not r.requires_grad for r in rewards)


@pytest.mark.parametrize("name", LOSSES)
def test_permuting_pairs_permutes_losses_and_only_coupled_ones_mix_them(name):
    data, order = random_data(), torch.tensor([2, 0, 3, 1])
    whole = call(name, data, **OPTIONS[name])[0]
    permuted = call(name, {n: v[order] for n, v in data.items()}, **OPTIONS[name])[0]
    torch.testing.assert_close(permuted, whole[order])
    alone = torch.cat([call(name, {n: v[i : i + 1] for n, v in data.items()}, **OPTIONS[name])[0] for i in range(4)])
    assert torch.equal(alone, whole) == (LOSSES[name] not in losses.COUPLED)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chosen", [-2e4, 0.0])
@pytest.mark.parametrize("rejected", [-2e4, 0.0])
def test_finite_where_margins_are_10000(name, chosen, rejected):
    data = random_data(1)
    data |= {"chosen_logps": t(chosen), "rejected_logps": t(rejected), "logps": t(chosen)}
    data |= {n: t(-1e4) for n in ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")}
    names = differentiable(name, data)
    leaves = [data[n].clone().requires_grad_() for n in names]
    options = OPTIONS[name] | ({"beta": 1.0} if "beta" in OPTIONS[name] else {})
    value, *_ = call(name, data | dict(zip(names, leaves, strict=True)), **options)
    value.sum().backward()
    assert value.float().isfinite().all()
    assert all(leaf.grad.float().isfinite().all() for leaf in leaves)


def gradient(name, data, of, **options):
    leaf = data[of].clone().requires_grad_()
    call(name, data | {of: leaf}, **options)[0].sum().backward()
    return leaf.grad


GRID = torch.cartesian_prod(*[torch.linspace(-60, 60, 25, dtype=torch.float64)] * 2)
ON_GRID = {
    "chosen_logps": GRID[:, 0] - 100,
    "rejected_logps": GRID[:, 1] - 100,
    "logps": GRID[:, 0] - 100,
    "chosen_lengths": torch.full((len(GRID),), 7.0),
    "rejected_lengths": torch.full((len(GRID),), 5.0),
    "desirable": torch.tensor(True),
    "kl": torch.tensor(0.5),
    "delta": torch.tensor(0.5),
    **{n: torch.full((len(GRID),), -100.0) for n in ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")},
}


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "apo_zero", "dpop", "hinge", "simpo", "kto", "bco"])
def test_never_pushes_the_chosen_sequence_down(name):
    options = OPTIONS[name] | ({"label_smoothing": 0.0} if name == "dpo" else {})
    of = "chosen_logps" if "chosen_logps" in inspect.signature(LOSSES[name]).parameters else "logps"
    assert float(gradient(name, ON_GRID, of, **options).max()) <= 0


def paired(chosen, rejected):
    """Log-ratios of one pair, in nats, over a reference of -100."""
    return {
        "chosen_logps": t(chosen) - 100,
        "rejected_logps": t(rejected) - 100,
        "ref_chosen_logps": t(-100),
        "ref_rejected_logps": t(-100),
        "chosen_lengths": t(1),
        "rejected_lengths": t(1),
    }


def cal_dpo_root(beta):
    c = 0.0
    for _ in range(100):
        c = 1 / (2 * beta) + sigmoid(-2 * c) / 2
    return c


@pytest.mark.parametrize(
    ("name", "options", "chosen", "rejected"),
    [
        ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, 2 * log(9), 0),  # m = log((1 - e) / e)
        ("ipo", {"beta": 0.1}, 7, 2),  # h = 1 / (2 beta) = 5
        ("exo", {"beta": 0.5, "epsilon": 0.1}, 2 * log(9), 0),  # m = log((1 - e) / e)
        ("nca", {"beta": 0.5}, 2 * log(2), 3),  # r_chosen = log 2
        ("sppo", {"beta": 0.1}, 5, -5),  # +- 1 / (2 beta)
        ("apo_down", {"beta": 0.5}, 2, 4),  # |r_c| = |r_c - r_r|
        ("cal_dpo", {"beta": 0.1}, cal_dpo_root(0.1), -cal_dpo_root(0.1)),
    ],
)
def test_stationary_in_the_chosen_sequence_where_its_docstring_says(name, options, chosen, rejected):
    at, before, beyond = (
        gradient(name, paired(chosen + step, rejected), "chosen_logps", **options).item() for step in (0, -0.1, 0.1)
    )
    assert at == pytest.approx(0, abs=1e-12)
    assert min(before, beyond) < -1e-6 and max(before, beyond) > 1e-6


def test_discopop_pushes_the_chosen_sequence_down_around_0_alone():
    # the loss, by its formula: 0.789 at m = -0.15, 0.787 at -0.1, 0.847 at 0, 0.875 at 0.05, 0.874 at 0.1
    pushed = [m for m in range(-20, 21) if gradient("discopop", paired(m / 20, 0), "chosen_logps", beta=1.0) > 0]
    assert pushed == [-2, -1, 0, 1]


def test_at_the_reference():
    at = random_data()
    at |= {"chosen_logps": at["ref_chosen_logps"], "rejected_logps": at["ref_rejected_logps"]}
    at |= {"logps": at["ref_logps"], "kl": t(0)[0], "rejected_lengths": at["chosen_lengths"]}
    expected = {
        log(2): [
            "dpo",
            "length_normalized_dpo",
            "r_dpo",
            "dpop",
            "dpo_shift",
            "f_dpo",
            "chi_po",
            "aot",
            "aot_unpaired",
        ],
        0.5: ["kto", "apo_zero_unpaired"],
        1.0: ["apo_zero", "apo_down", "hinge"],
        2 * log(2): ["nca", "bco_pair"],
    }
    for value, names in expected.items():
        for name in names:
            options = {n: v for n, v in OPTIONS[name].items() if n != "desirable_weight"}
            assert call(name, at, **options)[0].tolist() == pytest.approx([value] * 4), name
    assert call("ipo", at, beta=0.1)[0].tolist() == pytest.approx([1 / (4 * 0.1**2)] * 4)
    assert call("sppo", at, beta=0.1)[0].tolist() == pytest.approx([2 / (4 * 0.1**2)] * 4)


def test_identities():
    data = random_data()
    zero = {n: torch.zeros(4, dtype=torch.float64) for n in ("kl", "delta", "chosen_seq_kl", "rejected_seq_kl")}
    apart = data | {"chosen_scores": data["rejected_scores"] + 1}
    dpo = call("dpo", data, beta=0.3)[0]
    reverse, forward = losses.reverse_kl, losses.forward_kl
    alpha = lambda a: partial(losses.alpha_divergence, divergence_alpha=a)
    for same in (
        call("robust_dpo", data, beta=0.3, label_smoothing=0.0),
        call("r_dpo", data, beta=0.3, length_weight=0.0),
        call("irpo", data, beta=0.3, nll_weight=0.0),
        call("dpop", data, beta=0.3, penalty_weight=0.0),
        call("odpo", apart, beta=0.3, offset_weight=0.7),
        call("dpo_shift", data, beta=0.3, rejected_scale=1.0),
        call("f_dpo", data, beta=0.3, divergence=reverse),
        call("f_dpo", data, beta=0.3, divergence=alpha(0)),
        call("f_dpo", data, beta=0.3, divergence=alpha(1e-9)),
        call("tdpo1", data | zero, beta=0.3),
        call("tdpo2", data, beta=0.3, kl_weight=0.0),
    ):
        torch.testing.assert_close(same[0], dpo, rtol=1e-6, atol=1e-6)
    means = {n: data[n] / data[n.replace("logps", "lengths")] for n in ("chosen_logps", "rejected_logps")}
    pairs = [
        (call("simpo", data, beta=0.3, gamma=0.0), call("cpo", data | means, beta=0.3)),
        (call("alphapo", data, beta=0.3, gamma=0.2, alpha=0.0), call("simpo", data, beta=0.3, gamma=0.2)),
        (call("alphapo", data, beta=0.3, gamma=0.2, alpha=1e-8), call("simpo", data, beta=0.3, gamma=0.2)),
        (call("f_dpo", data, beta=0.3, divergence=alpha(1)), call("f_dpo", data, beta=0.3, divergence=forward)),
        (call("apo_zero_unpaired", data, beta=0.3), call("kto", data | zero, beta=0.3)),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
    slic = call("slic", data, delta=1 / 0.3)[0]
    torch.testing.assert_close(call("cpo_hinge", data, beta=0.3)[0], 0.3 * slic)
    both = {
        n: torch.cat([data[f"{p}chosen_logps"], data[f"{p}rejected_logps"]])
        for n, p in (("logps", ""), ("ref_logps", "ref_"))
    }
    bco = call("bco", both | {"desirable": torch.arange(8) < 4, "delta": t(0)[0]}, beta=0.3)[0]
    torch.testing.assert_close(call("bco_pair", data, beta=0.3)[0], bco[:4] + bco[4:])


HALF = partial(losses.alpha_divergence, divergence_alpha=0.5)


@pytest.mark.parametrize(
    ("name", "options", "of", "far"),
    [
        ("f_dpo", {"beta": 0.1, "divergence": losses.forward_kl}, "chosen_logps", -90),
        ("f_dpo", {"beta": 0.1, "divergence": HALF}, "chosen_logps", -170),
        ("chi_po", {"beta": 0.1}, "rejected_logps", 90),
        ("alphapo", {"beta": 0.1, "gamma": 0.0, "alpha": 2.0}, "chosen_logps", -45),
    ],
)
def test_an_exponent_that_would_overflow_is_clamped_and_its_gradient_0(name, options, of, far):
    data = paired(97, 97) | {"ref_chosen_logps": t(0), "ref_rejected_logps": t(0)}  # log-probabilities of -3
    near, beyond, further = (call(name, data | {of: t(x)}, **options)[0].item() for x in (far / 2, far, far * 2))
    assert near < beyond
    got = gradient(name, data | {of: t(far)}, of, **options).item()
    # log u itself, which chi-PO adds, stays
    assert got == pytest.approx(0.1 if name == "chi_po" else 0, abs=1e-12)
    assert further == (pytest.approx(beyond) if name == "chi_po" else beyond)


def test_chi_po_is_clipped_at_twice_its_bound():
    far = paired(3, -3)
    assert call("chi_po", far, beta=1.0, reward_bound=0.5)[0].item() == pytest.approx(nls(1.0))
    assert gradient("chi_po", far, "chosen_logps", beta=1.0, reward_bound=0.5).item() == 0


def test_exo_where_the_rejected_sequence_is_impossible():
    data = paired(0, 0) | {"rejected_logps": t(-torch.inf)}
    assert call("exo", data, beta=0.5, epsilon=0.1)[0].item() == pytest.approx(-log(0.9))
    assert gradient("exo", data, "chosen_logps", beta=0.5, epsilon=0.1).item() == 0


def test_orpo_is_exact_as_a_probability_goes_to_1():
    for rest in (1e-3, 1e-9, 1e-15, 1e-30):
        data = PAIR | {"chosen_logps": t(-rest), "chosen_lengths": t(1)}
        leaf = data["chosen_logps"].requires_grad_()
        value = call("orpo", data, beta=1.0)[0]
        # -log(sigmoid(log(o / o'))) = log(1 + o' / o), with odds o = 1 / rest and o'
        other = exp(-5.5) / (1 - exp(-5.5))
        assert value.item() == pytest.approx(other * rest, rel=2e-3 if rest > 1e-6 else 1e-9)
        value.sum().backward()
        assert leaf.grad.item() == pytest.approx(-other, rel=2e-3 if rest > 1e-6 else 1e-9)
    masked = PAIR | {"chosen_logps": t(0).requires_grad_(), "chosen_lengths": t(1)}
    value = call("orpo", masked, beta=1.0)[0]
    value.sum().backward()
    assert value.isfinite().all() and masked["chosen_logps"].grad.item() == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exo", {"beta": 0.1, "epsilon": 0.5}, r"epsilon must lie in \(0, 0.5\), got 0.5"),
        ("exo", {"beta": 0.1}, "missing: \\['epsilon'\\]"),
        ("dpo", {"beta": 0}, r"beta must lie in \(0, inf\), got 0"),
        ("dpo_shift", {"beta": 0.1, "rejected_scale": 1.5}, r"rejected_scale must lie in \(0, 1\], got 1.5"),
        ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        ("simpo", {"beta": 2.0, "gamma": float("nan")}, "gamma must be a finite number"),
        ("simpo", {"beta": 2.0, "gamma": 10**400}, "gamma must be a finite number"),
        ("dpoo", {}, "the losses by name are"),
        ("odpo", {"beta": 0.1, "offset_weight": 0.0}, r"offset_weight must lie in \(0, inf\), got 0"),
        ("f_dpo", {"beta": 0.1, "divergence": "js_divergence"}, "divergence must be a function .* is not callable"),
        ("f_dpo", {"beta": 0.1, "divergence": losses.alpha_divergence}, "fails: .*'divergence_alpha'"),
        (
            "f_dpo",
            {"beta": 0.1, "divergence": partial(losses.alpha_divergence, divergence_alpha=float("nan"))},
            "gives tensor",
        ),
        (partial(losses.exo_loss, beta=0.1), {"epsilon": 0.7}, r"epsilon must lie in \(0, 0.5\), got 0.7"),
        (partial(losses.exo_loss, beta=0), {"epsilon": 0.2}, r"beta must lie in \(0, inf\), got 0"),
    ],
)
def test_the_module_checks_options_by_their_ranges(name, options, message):
    with pytest.raises(ValueError, match=message):
        alignloss.PreferenceLoss(name, **options)


def slopes_by_mpmath(formula, at):
    """d formula / d x at each x, by differences of 500 digits."""
    with mpmath.workdps(500):
        return torch.tensor([float(mpmath.diff(formula, mpmath.mpf(x))) for x in at], dtype=torch.float64)


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


# of the chosen reward (or of a desirable sequence), beta = 1; the reward of the rejected sequence is -1/2
SATURATING = {
    "apo_zero": lambda x: 1 - sigma(x),
    "apo_down": lambda x: sigma(x) + 1 - sigma(x + mpmath.mpf(1) / 2),
    "exo": lambda x: sum(
        sigma(m) * (mpmath.log(sigma(m)) - mpmath.log(mpmath.mpf(q)))
        for m, q in ((x + mpmath.mpf(1) / 2, "0.9"), (-x - mpmath.mpf(1) / 2, "0.1"))
    ),
    "kto": lambda x: 1 - sigma(x),
    "apo_zero_unpaired": lambda x: 1 - sigma(x),
    "discopop": lambda x: (
        (1 - sigma(20 * (x + mpmath.mpf(1) / 2))) * -mpmath.log(sigma(x + mpmath.mpf(1) / 2))
        + sigma(20 * (x + mpmath.mpf(1) / 2)) * mpmath.exp(-x - mpmath.mpf(1) / 2)
    ),
}


@pytest.mark.parametrize("name", SATURATING)
def test_a_saturated_loss_keeps_its_slope(name):
    """Where sigmoid rounds to 1, and s (1 - s) to 0; against differences of 500 digits."""
    at = [-400.0, -100.0, -50.0, -37.0, -30.0, -5.0, 0.0, 5.0, 30.0, 37.0, 50.0, 100.0, 400.0]
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(x)
    if name in ("kto", "apo_zero_unpaired"):
        data = (x, zero, torch.ones(len(at), dtype=torch.bool), *([zero] if name == "kto" else []))
    else:
        data = (x, zero - 0.5, zero, zero)
    values = LOSSES[name](*data, beta=1.0, **({"epsilon": 0.1} if name == "exo" else {}))[0]
    (slopes,) = torch.autograd.grad(values.sum(), x)
    expected = slopes_by_mpmath(SATURATING[name], at)
    assert bool(((slopes - expected).abs() <= 1e-9 * expected.abs() + 1e-300).all()), (slopes, expected)


def test_discopop_of_an_impossible_chosen_sequence_is_infinite():
    chosen, zero = torch.tensor([-torch.inf], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for tau in (0.05, 1.0):
        assert float(losses.discopop_loss(chosen, zero, zero, zero, beta=0.1, tau=tau)[0]) == torch.inf

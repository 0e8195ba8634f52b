"""The losses and metrics beside those of the installed TRL 1.16 and Liger 0.8.5, where these are right.

TRL's losses stand inside its trainers: they run here with a model that returns log-probabilities given beforehand.
"""

import warnings
from collections import defaultdict
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from reference import inputs

import alignloss
from alignloss import losses

B, T = 5, 7
BETA = 0.3

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger_kernel is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trainers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer, KTOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


same = lambda value, *rest: value
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


@pytest.fixture
def batch():
    """2B sequences of T + 1 tokens with ragged completions, and what a head gives for them, in float32."""
    hidden, weight, _, labels = inputs(2 * B, T, masked=0.0, dtype=torch.float32)
    first, count = torch.randint(0, 3, (2 * B, 1)), torch.randint(2, 5, (2 * B, 1))
    position = torch.arange(T)
    labels = torch.where((position >= first) & (position < first + count), labels, -100)
    names = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    stats = alignloss.linear_logprob_stats(hidden, weight, labels, stats=names)
    sums, lengths = alignloss.sequence_logprob(hidden, weight, labels)
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        labels=labels,
        stats=stats,
        sums=sums,
        lengths=lengths,
        ref=sums + torch.randn(2 * B) * 2,
        # TRL masks tokens, we label the positions before them
        completion_mask=torch.nn.functional.pad((labels != -100).long(), (1, 0)),
    )


def model_of(batch):
    stats = {name: getattr(batch.stats, name) for name in ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")}
    outputs = SimpleNamespace(log_probs=batch.stats.logps, **stats)
    return lambda **inputs: outputs


def trl_dpo(trainers, batch, loss_type, **options):
    """TRL's loss and metrics for one of its loss types."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, loss_types=[loss_type],
        loss_weights=[1.0], beta=BETA, label_smoothing=0.0, args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=False, _metrics=defaultdict(partial(defaultdict, list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    vars(trainer).update(options)
    given = {
        "input_ids": torch.ones(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "completion_mask": batch.completion_mask,
        "ref_chosen_logps": batch.ref[:B],
        "ref_rejected_logps": batch.ref[B:],
    }
    loss = trainers.dpo._compute_loss(trainer, model_of(batch), given, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if isinstance(values, list)}


SMOOTH = {"label_smoothing": 0.1}
OF_TRL = {
    "sigmoid": ("dpo", {"beta": BETA}, {}),
    "hinge": ("hinge", {"beta": BETA}, {}),
    "ipo": ("ipo", {"beta": BETA}, {}),
    "exo_pair": ("exo", {"beta": BETA, "epsilon": 0.1}, SMOOTH),
    "nca_pair": ("nca", {"beta": BETA}, {}),
    "robust": ("robust_dpo", {"beta": BETA, **SMOOTH}, SMOOTH),
    "bco_pair": ("bco_pair", {"beta": BETA}, {}),
    "sppo_hard": ("sppo", {"beta": BETA}, {}),
    "aot": ("aot", {"beta": BETA, **SMOOTH}, SMOOTH),
    "aot_unpaired": ("aot_unpaired", {"beta": BETA, **SMOOTH}, SMOOTH),
    "apo_zero": ("apo_zero", {"beta": BETA}, {}),
    "apo_down": ("apo_down", {"beta": BETA}, {}),
    "discopop": ("discopop", {"beta": BETA}, {}),
    "sigmoid_norm": ("length_normalized_dpo", {"beta": BETA}, {}),
}


@needs_trl
@pytest.mark.parametrize("loss_type", OF_TRL)
def test_paired_losses_of_trl(loss_type, trainers, batch):
    name, options, theirs = OF_TRL[loss_type]
    expected, _ = trl_dpo(trainers, batch, loss_type, **theirs)
    out = alignloss.PreferenceLoss(name, **options)(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref)
    torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)


@needs_trl
@pytest.mark.parametrize(
    ("theirs", "divergence"),
    [
        ({"f_divergence_type": "forward_kl"}, losses.forward_kl),
        ({"f_divergence_type": "js_divergence"}, losses.js_divergence),
        # TRL's coefficient is 1 - ours
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            partial(losses.alpha_divergence, divergence_alpha=0.7),
        ),
    ],
)
def test_f_divergences_of_trl(theirs, divergence, trainers, batch):
    expected, _ = trl_dpo(trainers, batch, "sigmoid", **theirs)
    module = alignloss.PreferenceLoss("f_dpo", beta=BETA, divergence=divergence)
    out = module(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref)
    torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)


@needs_trl
def test_rpo_is_dpo_with_the_nll_of_trl(trainers, batch):
    dpo, sft = (trl_dpo(trainers, batch, loss_type)[0] for loss_type in ("sigmoid", "sft"))
    out = alignloss.DPOLoss(beta=BETA, nll_weight=0.4)(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref)
    torch.testing.assert_close(out.loss, dpo + 0.4 * sft, rtol=2e-5, atol=1e-6)


@needs_trl
def test_wpo_and_ld_dpo_weights_of_trl(trainers, batch):
    expected, _ = trl_dpo(trainers, batch, "sigmoid", use_weighting=True)
    weights = alignloss.wpo_pair_weights(batch.stats, batch.labels)
    dpo = alignloss.DPOLoss(beta=BETA)
    out = dpo(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref, pair_weights=weights)
    torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)

    expected, _ = trl_dpo(trainers, batch, "sigmoid", ld_alpha=0.3)
    weights = alignloss.ld_dpo_token_weights(batch.labels, tail_weight=0.3)
    out = dpo(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref, token_weights=weights)
    torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)


@needs_trl
def test_metrics_of_trls_dpo_trainer(trainers, batch):
    _, expected = trl_dpo(trainers, batch, "sigmoid")
    out = alignloss.DPOLoss(beta=BETA)(
        batch.hidden,
        batch.weight,
        batch.labels,
        ref_logps=batch.ref,
        stats=("entropy", "mean_logits", "is_top1"),
    )
    metrics = {name: value.item() for name, value in out.metrics().items()}
    assert set(expected) - set(metrics) == {"num_tokens"}  # a count over the run, not of a batch
    for name in set(expected) & set(metrics):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@needs_trl
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_unpaired_losses_and_metrics_of_trl(loss_type, trainers, batch):
    desirable = torch.arange(2 * B) % 3 > 0
    kl_logps, ref_kl_logps = torch.randn(2 * B) - 5, torch.randn(2 * B) - 6
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, loss_type=loss_type,
        precompute_ref_logps=True, calculate_KL=loss_type == "kto", beta=BETA, desirable_weight=1.3,
        undesirable_weight=0.7, _metrics=defaultdict(partial(defaultdict, list)), _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl_logps,
    )  # fmt: skip
    if loss_type == "apo_zero_unpaired":
        trainer.desirable_weight = trainer.undesirable_weight = 1.0
    given = {
        "input_ids": torch.ones(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "completion_mask": batch.completion_mask,
        "label": desirable,
        "ref_logps": batch.ref,
        "ref_KL_logps": ref_kl_logps,
    }
    loss = trainers.kto._compute_loss(trainer, model_of(batch), given, False)
    data = {"ref_logps": batch.ref, "desirable": desirable}
    if loss_type == "kto":
        data["kl"] = alignloss.kto_kl(kl_logps, ref_kl_logps)
        module = alignloss.KTOLoss(beta=BETA, desirable_weight=1.3, undesirable_weight=0.7)
    else:
        module = alignloss.PreferenceLoss(loss_type, beta=BETA)
    out = module(batch.hidden, batch.weight, batch.labels, stats=("entropy", "mean_logits"), **data)
    torch.testing.assert_close(out.loss, loss, rtol=2e-5, atol=1e-6)
    expected = {n: values[-1] for n, values in trainer._metrics["train"].items() if isinstance(values, list)}
    metrics = {name: value.item() for name, value in out.metrics().items()}
    missing = {"num_tokens"} if loss_type == "kto" else {"num_tokens", "kl"}  # a loss without a KL logs none
    assert set(expected) - set(metrics) == missing
    for name in set(expected) & set(metrics):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@needs_trl
@pytest.mark.parametrize(
    ("loss_type", "alpha", "name", "options", "means"),
    [
        ("sigmoid", 0.0, "cpo", SMOOTH, False),
        ("hinge", 0.0, "cpo_hinge", {}, False),
        ("ipo", 0.0, "cpo_ipo", {}, True),
        # theirs is the ratio gamma / beta, times beta: the same
        ("simpo", 0.0, "simpo", {"gamma": 0.4, **SMOOTH}, True),
        ("simpo", 0.25, "alphapo", {"gamma": 0.4, "alpha": 0.25}, True),
    ],
)
def test_reference_free_losses_of_trl(loss_type, alpha, name, options, means, trainers, batch):
    trainer = SimpleNamespace(
        alpha=alpha, loss_type=loss_type, beta=BETA, simpo_gamma=0.4, accelerator=ACCELERATOR,
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    logps = batch.sums / batch.lengths if means else batch.sums  # its trainer averages for these
    values, *rewards = trainers.cpo.cpo_loss(trainer, logps[:B], logps[B:])
    out = alignloss.PreferenceLoss(name, beta=BETA, **options)(batch.hidden, batch.weight, batch.labels)
    torch.testing.assert_close(out.losses, values, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close((out.chosen_rewards, out.rejected_rewards), tuple(rewards), rtol=2e-5, atol=1e-6)


@needs_trl
def test_orpo_and_its_metrics_of_trl(trainers, batch):
    means = batch.sums / batch.lengths
    trainer = SimpleNamespace(beta=BETA, accelerator=ACCELERATOR)
    values, chosen, rejected, ratio, odds = trainers.orpo.odds_ratio_loss(trainer, means[:B], means[B:])
    out = alignloss.ORPOLoss(beta=BETA)(batch.hidden, batch.weight, batch.labels)
    torch.testing.assert_close(out.losses, -values, rtol=2e-5, atol=1e-6)  # its trainer subtracts them
    torch.testing.assert_close((out.chosen_rewards, out.rejected_rewards), (chosen, rejected), rtol=2e-5, atol=1e-6)
    metrics = out.metrics()
    torch.testing.assert_close(metrics["log_odds_ratio"], ratio, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(metrics["log_odds_chosen"], odds, rtol=2e-5, atol=1e-6)


# Liger's DPO has no IPO and no AOT, and ignores label_smoothing under "sigmoid"
OF_LIGER = ("hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")


@needs_liger
@pytest.mark.parametrize("loss_type", ["sigmoid", *OF_LIGER])
def test_paired_losses_of_liger(loss_type, batch):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    name, options, theirs = OF_TRL[loss_type]
    halves = batch.sums[:B], batch.sums[B:], batch.labels, batch.ref[:B], batch.ref[B:]
    expected = LigerFusedLinearDPOFunction.preference_loss_fn(*halves, beta=BETA, loss_type=loss_type, **theirs)[0]
    out = alignloss.PreferenceLoss(name, **options)(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref)
    torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)


@needs_liger
def test_reference_free_and_unpaired_losses_of_liger(batch):
    from liger_kernel.chunked_loss import cpo_loss, kto_loss, orpo_loss, simpo_loss

    means, sums, labels = batch.sums / batch.lengths, batch.sums, batch.labels
    cpo = cpo_loss.LigerFusedLinearCPOFunction.preference_loss_fn(sums[:B], sums[B:], labels, BETA, 0.1)[0]
    simpo = simpo_loss.LigerFusedLinearSimPOFunction.preference_loss_fn(means[:B], means[B:], labels, BETA, 0.4, 0.1)[0]
    orpo = orpo_loss.LigerFusedLinearORPOFunction.preference_loss_fn(means[:B], means[B:], labels, BETA)[0]
    for name, options, expected in (
        ("cpo", SMOOTH, cpo),
        ("simpo", {"gamma": 0.4, **SMOOTH}, simpo),
        ("orpo", {}, orpo),
    ):
        out = alignloss.PreferenceLoss(name, beta=BETA, **options)(batch.hidden, batch.weight, labels)
        torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)
    desirable, kl = torch.arange(2 * B) % 3 > 0, torch.tensor(0.6)
    kto = kto_loss.LigerFusedLinearKTOFunction.preference_loss_fn(sums, desirable, labels, batch.ref, BETA, kl)[0]
    out = alignloss.KTOLoss(beta=BETA)(
        batch.hidden, batch.weight, labels, ref_logps=batch.ref, desirable=desirable, kl=kl
    )
    torch.testing.assert_close(out.loss, kto, rtol=2e-5, atol=1e-6)

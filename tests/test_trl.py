"""TRL's trainers on alignloss: five steps have TRL's own losses and metrics, with a GEMM less where the head trains."""

import copy
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import alignloss

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

import alignloss.trl as ours  # noqa: E402
from alignloss.modules import own_loss  # noqa: E402
from alignloss.ops import onepass, walk  # noqa: E402
from alignloss.trl import seam  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers
V, H = 40, 16
WORDS = random.Random(0)
# of 5 steps, in which the weights change by 1e-2
STEPS, LOSS, METRICS = 5, 1e-5, 2e-5
NOT_COMPARED = ("runtime", "per_second", "step_time", "epoch", "learning_rate")


def words(count):
    return " ".join(f"w{WORDS.randrange(V - 3)}" for _ in range(count))


PAIRS = Dataset.from_list(
    [
        {
            "prompt": words(WORDS.randint(2, 5)) + " ",
            "chosen": words(WORDS.randint(1, 6)),
            "rejected": words(WORDS.randint(1, 6)),
        }
        for _ in range(8)
    ]
)
UNPAIRED = Dataset.from_list(
    [
        {"prompt": words(3) + " ", "completion": words(WORDS.randint(1, 6)), "label": number % 3 > 0}
        for number in range(16)
    ]
)
COMPLETIONS = UNPAIRED.remove_columns("label")
PROMPTS = Dataset.from_list([{"prompt": words(3)} for _ in range(16)])
TEXTS = Dataset.from_list([{"text": words(WORDS.randint(3, 9))} for _ in range(16)])


def tokenizer():
    vocabulary = {f"w{number}": number for number in range(V - 3)} | {"<pad>": V - 3, "<eos>": V - 2, "<unk>": V - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(seed=0, cls="Llama", **options):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "pad_token_id": V - 3, "eos_token_id": V - 2, "bos_token_id": 0,
        "tie_word_embeddings": False, "initializer_range": 0.3,
    }  # fmt: skip
    config = getattr(transformers, f"{cls}Config")(**sizes | options)
    return getattr(transformers, f"{cls}ForCausalLM")(config)


def arguments(config, folder, **options):
    settings = {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "logging_steps": 1, "report_to": [], "seed": 0,
        "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return config(output_dir=str(folder), **settings | options)


def trainer(cls, config, data, folder, extra=(), make=model, dtype=torch.float32, **options):
    torch.manual_seed(0)
    built = {
        name: value() if callable(value) and name != "reward_funcs" else value for name, value in dict(extra).items()
    }
    built = {name: value.to(dtype) if isinstance(value, torch.nn.Module) else value for name, value in built.items()}
    settings = arguments(config, folder, **options)
    return cls(model=make().to(dtype), args=settings, train_dataset=data, processing_class=tokenizer(), **built)


def odds_margin(chosen_logps, rejected_logps, scores, *, beta):
    """A loss of a user's own, with a data column beside the log-probabilities."""
    rewards = beta * chosen_logps, beta * rejected_logps
    losses = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1] - scores)
    return losses, *(reward.detach() for reward in rewards)


def logs(trained):
    trained.train()
    found = [
        {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}
        for entry in trained.state.log_history
        if "loss" in entry
    ]
    assert len(found) == STEPS
    return found


def compare(theirs, mine, config, data, folder, extra=(), also=(), differ=(), **options):
    """Losses, gradient norms and metrics of the steps of two trainers; `also` is what ours is given beside.

    Adam makes a step of lr from the smallest gradient, so that rounding grows from step to step, by how much depends
    on the processor: where the two differ by more than the tolerance, TRL's own trainer in float64 is the judge, and
    ours may be at most twice as far from it as TRL's in float32.
    """
    expected = logs(trainer(theirs, config, data, folder, extra, **options))
    trained = trainer(mine, config, data, folder, {**dict(extra), **dict(also)}, **options)
    found, exact = logs(trained), None
    for step, (value, got) in enumerate(zip(expected, found, strict=True)):
        assert value.keys() == got.keys()
        for name in value.keys() - set(differ):
            tolerance = (LOSS if name == "loss" else METRICS) * max(1, abs(value[name]))
            if abs(got[name] - value[name]) > tolerance:
                exact = exact or logs(trainer(theirs, config, data, folder, extra, dtype=torch.float64, **options))
                truth = exact[step][name]
                assert abs(got[name] - truth) <= max(tolerance, 2 * abs(value[name] - truth)), name
    return trained


REFERENCE = {"ref_model": lambda: model(1)}
LORA = {"peft_config": lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])}
DPO = {
    **{
        loss: {"loss_type": [loss]}
        for loss in (
            "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
            "apo_down", "discopop", "sft", "sigmoid_norm",
        )
    },
    **{loss: {"loss_type": [loss], "label_smoothing": 0.1} for loss in ("exo_pair", "robust")},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "WPO": {"use_weighting": True},
    "LD": {"ld_alpha": 0.5},
    **{name: {"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("case", DPO)
def test_dpo(case, tmp_path):
    compare(trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE, **DPO[case])


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_kto(loss, precomputed, tmp_path):
    options = {"loss_type": loss, "precompute_ref_log_probs": precomputed}
    compare(trl.KTOTrainer, ours.KTOTrainer, trl.KTOConfig, UNPAIRED, tmp_path, REFERENCE, **options)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (TEXTS, {}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"loss_type": "dft"}),
        (COMPLETIONS, {"gradient_accumulation_steps": 2}),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
        (TEXTS, {"label_smoothing_factor": 0.1}),
    ],
)
def test_sft(data, options, tmp_path):
    compare(trl.SFTTrainer, ours.SFTTrainer, trl.SFTConfig, data, tmp_path, **options)


# theirs are means over prompts and padding
LOGITS = ("logits/chosen", "logits/rejected")


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "simpo", "alphapo"])
def test_cpo(loss, tmp_path):
    options = {"loss_type": loss, "max_length": 32, "cpo_alpha": 0.0 if loss == "simpo" else 1.0}
    compare(CPOTrainer, ours.CPOTrainer, CPOConfig, PAIRS, tmp_path, differ=LOGITS, **options)


def test_orpo(tmp_path):
    compare(ORPOTrainer, ours.ORPOTrainer, ORPOConfig, PAIRS, tmp_path, differ=LOGITS, max_length=32)


ONLINE = {"num_generations": 4, "max_completion_length": 8, "beta": 0.0}
REWARD = {"reward_funcs": lambda completions, **_: [float(len(completion) % 7) for completion in completions]}


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo")),
        {"temperature": 0.7},
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5},
    ],
)
def test_grpo(options, tmp_path):
    compare(trl.GRPOTrainer, ours.GRPOTrainer, trl.GRPOConfig, PROMPTS, tmp_path, REWARD, **ONLINE, **options)


def test_rloo(tmp_path):
    compare(trl.RLOOTrainer, ours.RLOOTrainer, trl.RLOOConfig, PROMPTS, tmp_path, REWARD, **ONLINE)


def moe():
    return model(0, "Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)


@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_router_losses(kind, tmp_path):
    theirs, mine, config = (getattr(module, f"{kind}{name}") for module, name in (
        (trl, "Trainer"), (ours, "Trainer"), (trl, "Config"),
    ))  # fmt: skip
    data, extra = (PAIRS, {"ref_model": moe}) if kind == "DPO" else (TEXTS, {})
    trained = compare(theirs, mine, config, data, tmp_path, extra, make=moe, router_aux_loss_coef=0.1)
    assert "aux_loss" in next(entry for entry in trained.state.log_history if "loss" in entry)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "CPO"])
def test_router_losses_beside_a_loss_of_ours(kind, tmp_path):
    """They weigh as in TRL's trainer of the same loss; CPO's reads the coefficient from the model."""
    own, data = getattr(alignloss, f"{kind}Loss")(beta=0.1), UNPAIRED if kind == "KTO" else PAIRS
    more = {"router_aux_loss_coef": 0.1} if kind in ("DPO", "KTO") else {}
    extra = {"ref_model": moe} if more else {}
    theirs, config = (
        getattr(trl if more else sys.modules[__name__], f"{kind}{name}") for name in ("Trainer", "Config")
    )
    make = lambda: model(0, "Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
    expected = logs(trainer(theirs, config, data, tmp_path, extra, make=make, **more))
    extra |= {"loss": lambda: own}
    got = logs(trainer(getattr(ours, f"{kind}Trainer"), config, data, tmp_path, extra, make=make, **more))
    for truth, mine in zip(expected, got, strict=True):
        assert "aux_loss" in mine
        for name in {"loss", "grad_norm", "aux_loss"} & truth.keys():
            assert abs(mine[name] - truth[name]) <= METRICS * max(1, abs(truth[name])), name


ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "the head saved": lambda: peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, tmp_path):
    extra = {"peft_config": ADAPTERS[adapter]}
    compare(trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra)


def test_lora_on_the_head_trains_where_trl_refuses_it(tmp_path):
    extra = {"peft_config": lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])}
    with pytest.raises(ValueError, match="head"):
        trainer(trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra)
    trained = trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra)
    head = trained.model.get_output_embeddings()
    logs(trained)
    assert head.lora_B["default"].weight.norm() > 0


def test_references_that_the_data_has_are_taken(tmp_path):
    first = trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE, precompute_ref_log_probs=True)
    expected = logs(first)
    batch = first.data_collator([first.train_dataset[i] for i in range(len(PAIRS))])
    chosen, rejected = first.compute_ref_log_probs(first.ref_model or model(1), batch)
    given = PAIRS.add_column("ref_chosen_logps", chosen.tolist()).add_column("ref_rejected_logps", rejected.tolist())
    again = trainer(ours.DPOTrainer, trl.DPOConfig, given, tmp_path, REFERENCE, precompute_ref_log_probs=True)
    for truth, got in zip(expected, logs(again), strict=True):
        assert abs(truth["loss"] - got["loss"]) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "workspace"), [("DPO", 12_000), ("KTO", 8_000), ("SFT", 10_000), ("CPO", 12_000)]
)  # fmt: skip
def test_groups_of_pairs_have_the_same_losses_and_metrics(kind, workspace, tmp_path, monkeypatch):
    counts, original = [], own_loss.one_pass
    monkeypatch.setattr(
        own_loss, "one_pass", lambda projection, indices, *rest: (
            counts.append(len(indices)), original(projection, indices, *rest),
        )[1]
    )  # fmt: skip
    setups = {
        "DPO": (trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, REFERENCE, {}),
        "KTO": (trl.KTOTrainer, ours.KTOTrainer, trl.KTOConfig, UNPAIRED, REFERENCE, {}),
        "SFT": (trl.SFTTrainer, ours.SFTTrainer, trl.SFTConfig, TEXTS, {}, {}),
        "CPO": (CPOTrainer, ours.CPOTrainer, CPOConfig, PAIRS, {}, {"max_length": 32, "differ": LOGITS}),
    }
    theirs, mine, config, data, extra, options = setups[kind]
    also = {"head_options": {"workspace_bytes": workspace}}
    compare(theirs, mine, config, data, tmp_path, extra, also, **options)
    assert len(counts) == STEPS and max(counts) > 1


@pytest.fixture
def work(monkeypatch):
    """FLOPs of the products of a head, each."""
    flops = []

    def counted(out, a, b, real=walk.addmm, **options):
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        real(out, a, b, **options)

    for module in (walk, onepass):
        monkeypatch.setattr(module, "addmm", counted)
    return flops


def labelled(trained, batch):
    both = trained.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=V - 3, device=trained.accelerator.device
    )
    scored = both["concatenated_labels"][:, 1:] != -100
    if isinstance(trained, ORPOTrainer):
        pairs = len(scored) // 2
        scored[:pairs] |= both["concatenated_attention_mask"][:pairs, 1:] == 1
    return scored


@pytest.mark.parametrize("workspace", [None, 16_000])
def test_gemms(workspace, work, tmp_path):
    def count(cls, config, data, extra=(), **options):
        given = {**dict(extra), "head_options": {"workspace_bytes": workspace, "backend": "torch"}}
        trained = trainer(cls, config, data, tmp_path, given, **options)
        batch = trained._prepare_inputs(next(iter(trained.get_train_dataloader())))
        trained.model.train()
        work.clear()
        trained.compute_loss(trained.model, batch).backward()
        shifted = batch["completion_mask"][:, 1:] if "completion_mask" in batch else labelled(trained, batch)
        return sum(work) / (2 * int(shifted.sum()) * V * H)

    # with the one of the reference; KTO's mismatched completions are a pass of both by themselves
    assert count(ours.DPOTrainer, trl.DPOConfig, PAIRS, REFERENCE) == 4
    assert count(ours.DPOTrainer, trl.DPOConfig, PAIRS, LORA) == 3
    assert count(ours.KTOTrainer, trl.KTOConfig, UNPAIRED, REFERENCE, loss_type="apo_zero_unpaired") == 4
    assert count(ours.CPOTrainer, CPOConfig, PAIRS, max_length=32) == 3
    assert count(ours.ORPOTrainer, ORPOConfig, PAIRS, max_length=32) == 3


def test_gemms_of_trl(tmp_path):
    """What the page compares with: TRL's head recomputes its logits in the backward, at every position on a CPU."""
    for extra, expected in ((REFERENCE, 4), (LORA, 3)):
        trained = trainer(trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra, precompute_ref_log_probs=True)
        batch = trained._prepare_inputs(next(iter(trained.get_train_dataloader())))
        trained.model.train()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
            trained.compute_loss(trained.model, batch).backward()
        products = [event for event in prof.events() if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
        assert sum(any(V in shape for shape in event.input_shapes) for event in products) == expected


def test_evaluation_and_its_metrics(tmp_path):
    expected, got = (
        trainer(cls, trl.DPOConfig, PAIRS, tmp_path, {**REFERENCE, "eval_dataset": PAIRS}).evaluate()
        for cls in (trl.DPOTrainer, ours.DPOTrainer)
    )
    for name, value in expected.items():
        if not any(part in name for part in NOT_COMPARED):
            assert abs(got[name] - value) <= METRICS * max(1, abs(value)), name


def test_a_loss_of_ours_or_of_the_users_takes_the_place_of_trls(tmp_path):
    same = {"loss": alignloss.DPOLoss(beta=0.1)}
    mine = logs(trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {**REFERENCE, "loss": lambda: same["loss"]}))
    theirs = logs(trainer(trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE))
    for truth, got in zip(theirs, mine, strict=True):
        assert truth.keys() <= got.keys()
        assert all(abs(truth[name] - got[name]) <= METRICS * max(1, abs(truth[name])) for name in truth)

    data = PAIRS.add_column("scores", [0.5] * len(PAIRS))
    loss = lambda: alignloss.PreferenceLoss(odds_margin, beta=0.1)
    users = logs(trainer(ours.DPOTrainer, trl.DPOConfig, data, tmp_path, {**REFERENCE, "loss": loss}))
    assert all(entry["loss"] > 0 for entry in users)
    mixture = lambda: alignloss.MixtureLoss([alignloss.SimPOLoss(), alignloss.CPOLoss()], weights=[1.0, 0.5])
    assert logs(trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {"loss": mixture, **REFERENCE}))
    kto = lambda: alignloss.KTOLoss(beta=0.1)
    mine = logs(trainer(ours.KTOTrainer, trl.KTOConfig, UNPAIRED, tmp_path, {**REFERENCE, "loss": kto}))
    theirs = logs(trainer(trl.KTOTrainer, trl.KTOConfig, UNPAIRED, tmp_path, REFERENCE))
    for truth, got in zip(theirs, mine, strict=True):
        assert all(abs(truth[name] - got[name]) <= METRICS * max(1, abs(truth[name])) for name in truth)
    for cls, config, wrong in (
        (ours.DPOTrainer, trl.DPOConfig, alignloss.KTOLoss()),
        (ours.KTOTrainer, trl.KTOConfig, alignloss.DPOLoss()),
        (ours.SFTTrainer, trl.SFTConfig, alignloss.DPOLoss()),
        (ours.DPOTrainer, trl.DPOConfig, "dpo"),
    ):
        with pytest.raises(ValueError, match="PreferenceLoss in place of its own, got"):
            trainer(cls, config, PAIRS, tmp_path, {"loss": lambda wrong=wrong: wrong})


def test_trls_own_trainers_while_patched_and_nothing_after(tmp_path):
    theirs = utils.add_fused_lm_head
    expected = logs(trainer(trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE))
    before = sys.modules.pop("trl.trainer.rloo_trainer", None)
    with ours.patched(workspace_bytes=1 << 20):
        rloo_trainer = importlib.import_module("trl.trainer.rloo_trainer")  # imported meanwhile
        assert rloo_trainer.add_fused_lm_head is not theirs
        trained = trainer(trl.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE)
    assert "alignloss" in trained.model.forward.__func__.__code__.co_filename
    if before is not None:
        sys.modules["trl.trainer.rloo_trainer"] = before
    for module in (utils, rloo_trainer, sys.modules["trl.trainer.dpo_trainer"], sys.modules["trl.trainer.sft_trainer"]):
        assert module.add_fused_lm_head is theirs
    for truth, got in zip(expected, logs(trained), strict=True):
        assert abs(truth["loss"] - got["loss"]) <= LOSS
    with pytest.raises(RuntimeError), ours.patched():
        raise RuntimeError
    assert utils.add_fused_lm_head is theirs
    with pytest.raises(ValueError, match="patched takes the options"), ours.patched(softcap=3.0):
        pass


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_by_itself(dtype, cast):
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ids = torch.randint(0, V - 3, (3, 7))
    labels = ids.masked_fill(torch.rand(3, 7) < 0.4, -100)
    found = []
    for add in (utils.add_fused_lm_head, ours.add_fused_lm_head):
        made = model(0, "Gemma2", final_logit_softcapping=3.0, head_dim=8).to(dtype)
        add(made, temperature=0.7, cast_lm_head_to_fp32=cast and dtype != torch.bfloat16, outputs=outputs)
        found.append(made(input_ids=ids, labels=labels, fused_lm_head=True))
        assert made(input_ids=ids).logits.shape == (3, 7, V)
        shifted = made(input_ids=ids, shift_labels=labels, fused_lm_head=True)
        assert shifted.log_probs.shape == (3, 7)
    theirs, mine = found
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for name in ("loss", *outputs, "label_mask"):
        a, b = getattr(theirs, name), getattr(mine, name)
        assert a.shape == b.shape
        torch.testing.assert_close(b.float(), a.float(), rtol=tolerance, atol=tolerance)
    assert not mine.entropy.requires_grad and mine.log_probs.requires_grad


def test_a_16_bit_head_in_float32():
    made = model().to(torch.bfloat16)
    ids = torch.randint(0, V - 3, (3, 7))
    ours.add_fused_lm_head(made, cast_lm_head_to_fp32=True)
    logps = made(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    hidden = made.model(input_ids=ids).last_hidden_state
    logits = hidden.double() @ made.lm_head.weight.double().T
    exact = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert float((logps - exact).abs().max()) <= 2e-5


def test_a_trl_that_is_not_known_is_named(monkeypatch):
    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model, heads: None)
    with pytest.raises(ImportError, match=r"knows TRL 1.15 and 1.16.*it takes \['model', 'heads'\]"):
        seam.check_seam()
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(ImportError, match="it takes nothing, for there is none"):
        seam.check_seam()


SHARED = {"sigmoid": {}, **{name: DPO[name] for name in (
    "ipo", "aot", "sft", "mixture", "WPO", "LD", "js_divergence", "precomputed", "accumulated", "checkpointed",
)}}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_shared_prompts(case, tmp_path):
    also = {"share_prompts": True}
    compare(trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE, also, **SHARED[case])


def test_shared_prompts_in_groups_with_adapters_and_another_loss(tmp_path):
    shared = {"share_prompts": True}
    groups = {**shared, "head_options": {"workspace_bytes": 12_000}}
    compare(trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, REFERENCE, groups)
    compare(trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, LORA, shared)
    loss = lambda: alignloss.PreferenceLoss("chi_po", beta=0.1)
    plain, behind = (
        logs(trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {**REFERENCE, "loss": loss, **also}))
        for also in ({}, shared)
    )
    for truth, got in zip(plain, behind, strict=True):
        assert truth.keys() == got.keys()
        assert all(abs(truth[name] - got[name]) <= METRICS * max(1, abs(truth[name])) for name in truth)


def test_shared_prompts_evaluated(tmp_path):
    expected, got = (
        trainer(cls, trl.DPOConfig, PAIRS, tmp_path, {**REFERENCE, "eval_dataset": PAIRS, **also}).evaluate()
        for cls, also in ((trl.DPOTrainer, {}), (ours.DPOTrainer, {"share_prompts": True}))
    )
    for name, value in expected.items():
        if not any(part in name for part in NOT_COMPARED):
            assert abs(got[name] - value) <= METRICS * max(1, abs(value)), name


def test_shared_prompts_where_there_are_none(tmp_path):
    shared = {"share_prompts": True}
    with pytest.raises(ValueError, match="KTOTrainer has no pairs behind one prompt"):
        trainer(ours.KTOTrainer, trl.KTOConfig, UNPAIRED, tmp_path, {**REFERENCE, **shared})
    with pytest.raises(ValueError, match="a router loss counts each prompt twice"):
        trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {"ref_model": moe, **shared}, make=moe)
    collate = trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {**REFERENCE, **shared}).data_collator
    batch = collate.collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}])
    batch["input_ids"][0, 0] = 7
    collate.collator = lambda examples: batch
    with pytest.raises(ValueError, match="in pair 0 of a batch they differ"):
        collate([])


@pytest.mark.parametrize(
    ("cls", "config", "also"),
    [
        (ours.DPOTrainer, trl.DPOConfig, REFERENCE),
        (ours.DPOTrainer, trl.DPOConfig, {**REFERENCE, "loss": alignloss.DPOLoss}),
        (ours.DPOTrainer, trl.DPOConfig, {**REFERENCE, "share_prompts": True}),
        (ours.DPOTrainer, trl.DPOConfig, {**LORA, "share_prompts": True}),
        (ours.SFTTrainer, trl.SFTConfig, {}),
        (None, CPOConfig, {}),
    ],
)
def test_mixed_precision(cls, config, also, tmp_path):
    """As TRL's configs have it by themselves: accelerate casts in the forward, and widens what comes out."""
    cls = cls or ours.CPOTrainer
    data = TEXTS if cls is ours.SFTTrainer else PAIRS
    wide, mixed = (logs(trainer(cls, config, data, tmp_path, also, bf16=bf16, max_length=32)) for bf16 in (False, True))
    assert abs(wide[0]["loss"] - mixed[0]["loss"]) <= 3e-2 * abs(wide[0]["loss"])


def token_logps(made, ids):
    with torch.no_grad():
        return made.double().eval()(ids).logits.log_softmax(-1)


@pytest.mark.parametrize("adapters", [False, True])
def test_tdpo_has_the_kl_of_its_tokens(adapters, tmp_path):
    loss, base = alignloss.PreferenceLoss("tdpo2", beta=0.5, kl_weight=0.3), model(0)
    extra = {"loss": lambda: loss, **(LORA if adapters else {"ref_model": lambda: model(1)})}
    trained = trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra, per_device_train_batch_size=8)
    if adapters:
        with torch.no_grad():
            for name, value in trained.model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.3)
    batch = trained._prepare_inputs(next(iter(trained.get_train_dataloader())))
    got = trained.compute_loss(trained.model, dict(batch))
    got.backward()
    ids, scored = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    policy = token_logps(copy.deepcopy(trained.model), ids)[:, :-1]
    reference = token_logps(base if adapters else model(1), ids)[:, :-1]
    kl = ((reference.exp() * (reference - policy)).sum(-1) * scored).sum(-1)
    logps, ref_logps = (
        (each.gather(-1, ids[:, 1:, None]).squeeze(-1) * scored).sum(-1) for each in (policy, reference)
    )
    expected, _, _ = alignloss.losses.tdpo2_loss(
        *logps.chunk(2), *ref_logps.chunk(2), *kl.chunk(2), beta=0.5, kl_weight=0.3
    )
    assert kl.min() > 1e-3
    assert got.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="no KL of tokens"):
        trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, {**extra, "share_prompts": True})


def test_bco_has_the_shift_of_the_steps_before(tmp_path):
    extra = {"loss": lambda: alignloss.PreferenceLoss("bco", beta=0.5), **REFERENCE}
    options = {"loss_type": "apo_zero_unpaired", "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    trained = trainer(ours.KTOTrainer, trl.KTOConfig, UNPAIRED, tmp_path, extra, **options)
    found = logs(trained)
    rewards = {True: [], False: []}
    for start in range(0, 16, 4):
        batch = trained.data_collator([trained.train_dataset[i] for i in range(start, start + 4)])
        ids, scored = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
        both = [
            (token_logps(model(seed), ids)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) * scored).sum(-1)
            for seed in (0, 1)
        ]
        means = [sum(kind) / len(kind) for kind in rewards.values() if kind]
        delta = torch.tensor(sum(means) / len(means) if means else 0.0, dtype=torch.float64)
        desirable = batch["label"].bool()
        losses, each = alignloss.losses.bco_loss(*both, desirable, delta, beta=0.5)
        assert found[start // 4]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        for reward, good in zip(each.tolist(), desirable.tolist(), strict=True):
            rewards[good].append(reward)


@pytest.mark.parametrize("adapters", [False, True])
def test_references_are_scored_into_a_cache(adapters, tmp_path):
    extra = LORA if adapters else {}
    options = {"precompute_ref_log_probs": True}
    expected = logs(trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra, **options))
    for _ in range(2):
        cached = {**extra, "reference_cache": tmp_path / "cache"}
        trained = trainer(ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, cached, **options)
        assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 1  # read the second time
        for truth, got in zip(expected, logs(trained), strict=True):
            assert got["loss"] == pytest.approx(truth["loss"], rel=1e-5)


def test_losses_that_do_not_fit_a_trainer(tmp_path):
    with pytest.raises(ValueError, match="CPOTrainer has no reference, which dpo_loss needs: give it to DPOTrainer"):
        trainer(ours.CPOTrainer, CPOConfig, PAIRS, tmp_path, {"loss": alignloss.DPOLoss}, max_length=32)

    data = PAIRS.add_column("scores", [0.5] * len(PAIRS))
    loss = lambda: alignloss.PreferenceLoss(odds_margin, beta=0.1)
    assert logs(trainer(ours.CPOTrainer, CPOConfig, data, tmp_path, {"loss": loss}, max_length=32))


def test_a_copy_of_a_trained_model_is_a_model_of_its_own():
    made = model()
    ours.add_fused_lm_head(made)
    copied = copy.deepcopy(made)
    ids = torch.randint(0, V - 3, (2, 6))
    expected = copied(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(copied(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, expected)
    assert copied(input_ids=ids).logits.abs().max() > 0


def in_one_of_two(rank, port, case, mine, folder):
    """Logs of a trainer in two processes."""
    if rank is None:  # of a launcher
        rank = int(os.environ["RANK"])
        os.environ["ACCELERATE_USE_CPU"] = "1"
    else:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1",
        }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, config, data, extra, options = TWO_PROCESSES[case]
    also = {"share_prompts": True} if mine and "shared" in case else {}
    batch = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False}
    theirs = {"CPOTrainer": CPOTrainer, "ORPOTrainer": ORPOTrainer}.get(name) or getattr(trl, name)
    kind = getattr(ours, name) if mine else theirs
    found = logs(trainer(kind, config, data, folder, {**extra, **also}, **batch, **options))
    if rank == 0:
        (folder / f"{mine}.json").write_text(json.dumps(found, default=float))
    torch.distributed.barrier()
    os._exit(0)


TWO_PROCESSES = {
    "DPO": ("DPOTrainer", trl.DPOConfig, PAIRS, REFERENCE, {}),
    "DPO, shared prompts": ("DPOTrainer", trl.DPOConfig, PAIRS, REFERENCE, {}),
    "DPO, LoRA": ("DPOTrainer", trl.DPOConfig, PAIRS, LORA, {}),
    "DPO, checkpointed": ("DPOTrainer", trl.DPOConfig, PAIRS, REFERENCE, {"gradient_checkpointing": True}),
    "KTO": ("KTOTrainer", trl.KTOConfig, UNPAIRED, REFERENCE, {}),
    "SFT": ("SFTTrainer", trl.SFTConfig, COMPLETIONS, {}, {}),
    "CPO": ("CPOTrainer", CPOConfig, PAIRS, {}, {}),
    "ORPO": ("ORPOTrainer", ORPOConfig, PAIRS, {}, {}),
    "GRPO": ("GRPOTrainer", trl.GRPOConfig, PROMPTS, REWARD, ONLINE),
    "RLOO": ("RLOOTrainer", trl.RLOOConfig, PROMPTS, REWARD, ONLINE),
}


@pytest.mark.nightly
@pytest.mark.parametrize("case", TWO_PROCESSES)
def test_two_processes(case, tmp_path):
    for mine in (False, True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torch.multiprocessing.spawn(in_one_of_two, (port, case, mine, tmp_path), nprocs=2)
    theirs, mine = (json.loads((tmp_path / f"{which}.json").read_text()) for which in (False, True))
    for truth, got in zip(theirs, mine, strict=True):
        assert truth.keys() == got.keys()
        for name, value in truth.items():
            if name not in LOGITS or case not in ("CPO", "ORPO"):
                assert abs(got[name] - value) <= (LOSS if name == "loss" else METRICS) * max(1, abs(value)), name


class WithImages:
    """TRL's collator of text, with an image before each prompt."""

    def __init__(self):
        self.collator = DataCollatorForPreference(pad_token_id=V - 3)

    def __call__(self, examples):
        batch = self.collator(examples)
        rows = len(batch["input_ids"])
        batch["input_ids"].masked_fill_(batch["input_ids"] == IMAGE, IMAGE + 1)
        for name, value in (("input_ids", IMAGE), ("attention_mask", 1), ("completion_mask", 0)):
            batch[name] = torch.cat([torch.full((rows, 4), value), batch[name]], 1)
        torch.manual_seed(0)
        return batch | {"pixel_values": torch.randn(rows, 3, 8, 8)}


IMAGE = 5


def llava():
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": V - 3, "eos_token_id": V - 2, "bos_token_id": 0}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**layers, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**layers, **special, vocab_size=V, initializer_range=0.3),
        **special,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_images(tmp_path):
    extra = {"ref_model": llava, "data_collator": WithImages}
    options = {"make": llava, "remove_unused_columns": False}
    compare(trl.DPOTrainer, ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra, **options)


def test_shared_prompts_have_no_images(tmp_path):
    extra = {"ref_model": llava, "data_collator": WithImages, "share_prompts": True}
    trained = trainer(
        ours.DPOTrainer, trl.DPOConfig, PAIRS, tmp_path, extra, make=llava, remove_unused_columns=False
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"text alone, and a batch has \['pixel_values'\] beside its tokens"):
        trained.train()


@pytest.mark.nightly
def test_accelerate_launch(tmp_path):
    """The trainers in two processes of the launcher: what they log there is what TRL's log."""
    found = {}
    for mine in (False, True):
        script = tmp_path / f"{mine}.py"
        script.write_text(
            "from pathlib import Path\n"
            "from test_trl import in_one_of_two\n"
            f"in_one_of_two(None, None, 'DPO', {mine}, Path({str(tmp_path)!r}))\n"
        )
        # its launcher of several processes on a CPU is mpirun's
        options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
        command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found[mine] = json.loads((tmp_path / f"{mine}.json").read_text())
    for truth, got in zip(found[False], found[True], strict=True):
        assert truth.keys() == got.keys()
        for name, value in truth.items():
            assert abs(got[name] - value) <= (LOSS if name == "loss" else METRICS) * max(1, abs(value)), name

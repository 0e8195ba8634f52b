"""Prompts computed once: loss and gradients of the padded layout, or a refusal of the model."""

from functools import partial

import pytest
import torch
from test_hf import SIZES, V

import alignloss

transformers = pytest.importorskip("transformers")
from alignloss.hf import UnsupportedModel, check_model, head_call, share_prompts  # noqa: E402
from alignloss.hf import prompts as module  # noqa: E402

GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
RIGHT = {
    "Llama": ("Llama", SIZES, "sdpa"),
    "Llama eager": ("Llama", SIZES, "eager"),
    "Gemma2, softcaps and windows": ("Gemma2", {**SIZES, "head_dim": 8, "sliding_window": 4}, "eager"),
    "Gemma3, windows": ("Gemma3Text", {**SIZES, "head_dim": 8, **LAYERS}, "sdpa"),
    "Mistral, a window": ("Mistral", {**SIZES, "sliding_window": 4}, "sdpa"),
    "Cohere2, windows": ("Cohere2", {**SIZES, **LAYERS}, "sdpa"),
    "Qwen3": ("Qwen3", {**SIZES, "head_dim": 8}, "sdpa"),
    "GPT2, learned positions": ("GPT2", {**GPT2, **WITHOUT_DROPOUT}, "sdpa"),
    "Mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4}, "sdpa"),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
NEXT = {
    "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "linear_num_value_heads": 2,
    "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GRIFFIN = {**SIZES, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 16}
NEO = {"vocab_size": V, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4}
REFUSED = {
    "Mamba": ("Mamba", {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2}, None, "takes no position_ids"),
    "Bloom": ("Bloom", {"vocab_size": V, "hidden_size": 16, "n_layer": 2, "n_head": 2}, None, "takes no position_ids"),
    "linear attention": ("Qwen3Next", {**SIZES, **NEXT}, "sdpa", r"layers of \['linear_attention'\]"),
    "recurrent": ("RecurrentGemma", GRIFFIN, "sdpa", "differ from those of two padded rows|layers of .'linear"),
    "a mask of its own": (
        "GPTNeo", {**NEO, "attention_types": [[["global", "local"], 1]]}, "eager", "differ from those of two padded",
    ),
    "flash": ("Llama", SIZES, "flash", 'computes attention by .flash.*attn_implementation="sdpa"'),
}  # fmt: skip


def make(kind, options, attention):
    config = getattr(transformers, f"{kind}Config")(**options)
    if attention not in (None, "flash"):
        config._attn_implementation = attention
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).train()
    if attention == "flash":  # which is not installed
        model.config._attn_implementation_internal = attention
    return model


def examples(pairs=3, shortest=1, longest=9):
    draw = lambda low, high: torch.randint(3, V, (int(torch.randint(low, high, ())),)).tolist()
    return [
        {"prompt_ids": draw(shortest, longest), "chosen_ids": draw(1, 7), "rejected_ids": draw(1, 5)}
        for _ in range(pairs)
    ]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, batch):
    """The loss of a batch and its gradients, shared and as two padded rows."""
    scale, cap = check_model(model)
    loss_fn = alignloss.DPOLoss(logit_scale=scale, softcap=cap)
    ref_logps = torch.linspace(-20, -15, len(batch.cu_seqlens) - 1)
    shared, _ = batch.head_call(
        model,
        lambda head: loss_fn(
            head.hidden, head.weight, batch.labels, head.bias, ref_logps=ref_logps, **batch.layout
        ),
    )  # fmt: skip
    got = gradients(model, shared.loss)
    ids, attended, where = batch.padded()
    labels = torch.full((ids.numel(),), -100).index_copy(0, where, batch.labels).view(ids.shape)
    padded, _ = head_call(
        model,
        lambda head: loss_fn(head.hidden, head.weight, labels, head.bias, ref_logps=ref_logps),
        input_ids=ids,
        attention_mask=attended,
        use_cache=False,
    )
    expected = gradients(model, padded.loss)
    assert abs(float(shared.loss.detach() - padded.loss.detach())) <= 1e-6
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm() + 0.01 * whole), name


@pytest.mark.parametrize("kind", RIGHT)
def test_loss_and_gradients_are_those_of_padded_rows(kind):
    compare(make(*RIGHT[kind]), share_prompts(examples()))


# transformers' own
flex = pytest.mark.filterwarnings("ignore")


@flex
@pytest.mark.nightly
@pytest.mark.parametrize(
    "kind",
    ["Mistral, a window", "Llama", "Gemma3, windows", "Gemma2, softcaps and windows"],
)
def test_flex_attention_by_its_definition(kind, monkeypatch):
    """Neither compiled nor refused on a CPU, where torch has no backward for it."""
    torchs = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    integration = pytest.importorskip("transformers.integrations.flex_attention")
    plain = lambda *args, training, **named: torchs.flex_attention(*args, **named)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    name, options, _ = RIGHT[kind]
    compare(make(name, options, "flex_attention"), share_prompts(examples()))


@pytest.mark.nightly
@flex
def test_flex_attention_compiled():
    hidden = []
    # rows of 37 shared tokens and 11 padded ones: of 8 or 24 torch 2.13 makes NaN on a CPU now and then
    pairs = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (list(range(3, 3 + n)) for n in lengths), strict=True))
        for lengths in ((5, 4, 3), (7, 2, 4), (3, 6, 3))
    ]
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        model, batch = make("Llama", {**SIZES, "head_dim": 16}, attention).eval(), share_prompts(pairs)
        with torch.no_grad():
            hidden.append(batch.head_call(model, lambda head: head.hidden)[0])
    torch.testing.assert_close(*hidden)


def test_blocks_are_those_that_are_seen():
    """Of 128 x 128: a prompt of 2 blocks, each completion 1; the rejected one does not see the chosen one."""
    ids = lambda length: list(range(3, 3 + length))
    batch = share_prompts([{"prompt_ids": ids(256), "chosen_ids": ids(128), "rejected_ids": ids(128)}])
    mask = batch._block_mask(None)
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert mask.full_kv_num_blocks.sum() == 1 + 2 + 2  # below the diagonal


def test_empty_prompts_and_completions():
    batch = share_prompts([*examples(3, 0, 2), {"prompt_ids": [5, 6], "chosen_ids": [], "rejected_ids": [7]}])
    compare(make("Llama", SIZES, "sdpa"), batch)
    assert batch.layout["real_sequences"] == 8


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_is_refused(what):
    kind, options, attention, message = REFUSED[what]
    model, batch = make(kind, options, attention), share_prompts(examples())
    with pytest.raises(UnsupportedModel, match=f"{kind}ForCausalLM.*{message}"):
        batch.head_call(model, lambda head: head.hidden.sum())
    assert model.training


def test_images_are_refused():
    example = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    share_prompts([{**example, "id": 3}])
    for name in ("pixel_values", "images", "input_features"):
        with pytest.raises(ValueError, match=rf"text alone, and the examples have \['{name}'\]"):
            share_prompts([example, {**example, name: torch.zeros(1)}])


def test_the_first_batch_is_compared_and_again_where_the_model_changed(monkeypatch):
    compared, padded = [], module.SharedPrompts.padded
    monkeypatch.setattr(module.SharedPrompts, "padded", lambda self: (compared.append(1), padded(self))[1])
    model = make("Llama", SIZES, "sdpa")
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [4, 3]}
    run = lambda *rows: share_prompts(rows).head_call(model, lambda head: head.hidden.sum())
    run({**row, "rejected_ids": [4]})  # nothing of its own to see: it does not count
    run(row)
    run(row, row)
    assert len(compared) == 2
    model.set_attn_implementation("eager")
    run(row)
    assert len(compared) == 3
    run({**row, "prompt_ids": [5] * 20})
    assert len(compared) == 4


@pytest.mark.parametrize(
    "first",
    [
        {"prompt_ids": [5], "chosen_ids": [7] * 30, "rejected_ids": [9]},
        {"prompt_ids": [5], "chosen_ids": [7] * 30, "rejected_ids": []},
        {"prompt_ids": [5], "chosen_ids": [], "rejected_ids": [9] * 30},
    ],
)
def test_a_wide_row_that_shows_nothing_does_not_count(first):
    """Beside a narrow row that would show a window, and does not reach it."""
    model = make("GPTNeo", {**NEO, "window_size": 8, "attention_types": [[["global", "local"], 1]]}, "eager")
    for parameter in model.parameters():
        parameter.data.mul_(4)
    short = {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [9, 8]}
    share_prompts([short, first]).head_call(model, len)
    with pytest.raises(UnsupportedModel, match="differ from those of two padded rows"):
        share_prompts([{"prompt_ids": list(range(3, 9)), "chosen_ids": [7] * 8, "rejected_ids": [9, 8, 7]}]).head_call(
            model, len
        )


def test_reach():
    """Row: where a scored rejected token is behind a chosen one; sequence: of prompt and a completion."""
    row = lambda *lengths: dict(
        zip(("prompt_ids", "chosen_ids", "rejected_ids"), ([3] * n for n in lengths), strict=True)
    )
    assert share_prompts([row(2, 3, 4)]).reach == (9, 6)
    assert share_prompts([row(2, 3, 1)]).reach == (0, 5)
    assert share_prompts([row(2, 0, 4)]).reach == (0, 6)
    assert share_prompts([row(1, 30, 1), row(2, 3, 2)]).to("cpu").reach == (7, 31)


# PEFT asks by a name that transformers 5.24 deprecates
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_learned_prompt_is_refused_also_after_its_model_without(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make("Llama", SIZES, "sdpa"), config)
    batch = share_prompts(examples())
    with model.disable_adapter():
        batch.head_call(model, len)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM carries a learned prompt or prefix"):
        batch.head_call(model, len)


def test_a_window_that_only_longer_rows_show():
    model = make("GPTNeo", {**NEO, "window_size": 12, "attention_types": [[["global", "local"], 1]]}, "eager")
    for parameter in model.parameters():
        parameter.data.mul_(4)
    share_prompts([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [9, 8]}]).head_call(model, len)
    longer = [{"prompt_ids": [5] * 9, "chosen_ids": [7] * 9, "rejected_ids": list(range(3, 12))}]
    with pytest.raises(UnsupportedModel, match="differ from those of two padded rows"):
        share_prompts(longer).head_call(model, len)


def test_a_row_by_eye():
    batch = share_prompts(
        [
            {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]},
            {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [2]},
        ],
        pad_token_id=1,
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 2, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [7, 8, 4, 9, 2]  # chosen, chosen, rejected, rejected
    assert batch.token_index.tolist() == [1, 2, 5, 1, 5]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 5]
    seen = batch._mask(torch.float32, None)[0, 0] == 0
    assert seen.long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the rejected token sees the prompt and itself
    ]
    near = batch._mask(torch.float32, 2)[0, 0] == 0
    assert near[4].long().tolist() == [0, 1, 0, 0, 1]  # one before it, by position


def test_max_length_and_a_loader():
    rows = examples(6)
    batch = share_prompts(rows, max_length=5)
    for example, count in zip(rows, batch.cu_seqlens.diff()[:6], strict=True):
        assert count == min(len(example["chosen_ids"]), max(0, 5 - len(example["prompt_ids"])))
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=partial(share_prompts, pad_token_id=2))
    assert [type(found).__name__ for found in loader] == ["SharedPrompts"] * 2


@pytest.mark.parametrize("given", [[], [{"prompt_ids": [1]}], [[1, 2]]])
def test_bad_input(given):
    with pytest.raises(ValueError, match="share_prompts takes at least one example, each a dictionary with"):
        share_prompts(given)

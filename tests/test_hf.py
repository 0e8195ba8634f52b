"""Models of transformers: the loss in their output projection has the value and gradients of their own logits."""

import threading
from contextlib import nullcontext

import pytest
import torch
from reference import error
from torch import nn

import alignloss

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AyaVisionConfig,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PhiConfig,
    SiglipVisionConfig,
    T5Config,
)

from alignloss.hf import Head, UnsupportedModel, check_model, head_call, hidden_and_head  # noqa: E402

V = 64
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# model, its config, and the transform that its config asks for
FAMILIES = {
    "Llama": ("LlamaForCausalLM", lambda: LlamaConfig(**SIZES), (1.0, None)),
    "Llama tied": ("LlamaForCausalLM", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True), (1.0, None)),
    "Gemma2": ("Gemma2ForCausalLM", lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0), (1.0, 3.0)),
    "Cohere": ("CohereForCausalLM", lambda: CohereConfig(**SIZES, logit_scale=0.0625), (0.0625, None)),
    "Granite": ("GraniteForCausalLM", lambda: GraniteConfig(**SIZES, logits_scaling=6.0), (1 / 6, None)),
    "Phi, with a bias": ("PhiForCausalLM", lambda: PhiConfig(**SIZES), (1.0, None)),
    "GPT2": ("GPT2LMHeadModel", lambda: GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2), (1.0, None)),
    "Mixtral": (
        "MixtralForCausalLM",
        lambda: MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
        (1.0, None),
    ),
    "T5": (
        "T5ForConditionalGeneration",
        lambda: T5Config(
            vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        (1.0, None),
    ),
}


def make(family, dtype=torch.float32):
    cls, config, _ = FAMILIES[family]
    model = getattr(transformers, cls)(config()).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def batch_of(model, rows=4, length=7):
    """Inputs of a model, and labels aligned with its hidden states."""
    ids = torch.randint(3, V, (rows, length))
    mask = (torch.arange(length) < torch.tensor([length, length - 1, length - 2, length])[:rows, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = alignloss.next_token_labels(ids, mask)
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids.flip(1)
        labels = torch.randint(0, V, ids.shape).masked_fill(mask == 0, -100)
    return batch, labels


def logps_of(labels):
    return lambda head: alignloss.linear_logprob(
        head.hidden, head.weight, labels, head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    )


def own_logps(logits, labels):
    picked = torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels == -100, 0, picked)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model, batch, labels, tolerance=2e-5):
    """Log-probabilities and the gradient of every parameter through head_call, beside the model's own logits."""
    upstream = torch.randn(labels.shape, dtype=torch.float64)
    ours, _ = head_call(model, logps_of(labels), **batch)
    got = gradients(model, (ours * upstream).sum())
    theirs = own_logps(model(**batch).logits[:, -labels.shape[1] :], labels)
    expected = gradients(model, (theirs * upstream).sum())
    assert error(ours.detach(), theirs.detach()) <= tolerance
    assert got.keys() == expected.keys() and got
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= tolerance * float(gradient.norm() + 0.01 * whole), name


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_every_gradient(family):
    model = make(family)
    check(model, *batch_of(model))
    assert check_model(model) == FAMILIES[family][2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_the_transform_of_16_bit_models_is_that_of_their_config(family, dtype):
    model = make(family, dtype)
    assert check_model(model) == FAMILIES[family][2]


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_model_in_float64(family):
    model = make(family, torch.float64)
    assert check_model(model) == FAMILIES[family][2]
    check(model, *batch_of(model), tolerance=1e-9)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_module_and_its_metrics(family):
    model = make(family).train()
    batch, labels = batch_of(model)
    scale, cap = check_model(model)
    loss_fn, ref = alignloss.DPOLoss(logit_scale=scale, softcap=cap), torch.randn(4)
    run = lambda head: loss_fn(head.hidden, head.weight, labels, head.bias, ref_logps=ref, stats=("entropy",))
    out, _ = head_call(model, run, **batch)
    got = gradients(model, out.loss)
    assert out.metrics()["entropy"].isfinite()
    later = run(hidden_and_head(model, batch))
    for name, gradient in gradients(model, later.loss).items():
        assert torch.equal(got[name], gradient)


def test_router_losses_are_kept():
    model = make("Mixtral").train()
    batch, labels = batch_of(model)
    logps, outputs = head_call(model, logps_of(labels), **batch)
    own = model(**batch)
    torch.testing.assert_close(outputs.aux_loss, own.aux_loss)
    got = gradients(model, outputs.aux_loss - logps.sum())
    expected = gradients(model, own.aux_loss - own_logps(own.logits, labels).sum())
    for name, gradient in expected.items():
        assert error(got[name], gradient) <= 2e-5


@pytest.mark.filterwarnings("ignore:.*_checkpointing:FutureWarning")  # another name from 5.24 on
def test_checkpointing_autocast_and_frozen_parts():
    model = make("Llama").train()
    batch, labels = batch_of(model)
    model.gradient_checkpointing_enable()
    check(model, batch, labels)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    check(model, batch, labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = head_call(model, logps_of(labels), **batch)
        theirs = own_logps(model(**batch).logits, labels)
    assert error(ours.detach(), theirs.detach()) <= 1e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
def test_a_compiled_model():
    model = make("Gemma2")
    batch, labels = batch_of(model)
    compiled = torch.compile(model, backend="eager")
    ours, _ = head_call(compiled, logps_of(labels), **batch)
    assert error(ours.detach(), own_logps(model(**batch).logits, labels).detach()) <= 2e-5


def image_batch(ids, size):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, size, size)}


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=60, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config), 60, 4, 8


def gemma3():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = {**SIZES, "head_dim": 8, "final_logit_softcapping": 2.0}
    config = Gemma3Config(vision_config=vision.to_dict(), text_config=text, mm_tokens_per_image=4, image_token_index=60)
    return transformers.Gemma3ForConditionalGeneration(config), 60, 4, 8


def aya_vision():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = CohereConfig(**SIZES, logit_scale=0.25)
    config = AyaVisionConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=60, vision_feature_layer=-1,
        downsample_factor=2, adapter_layer_norm_eps=1e-6,
    )  # fmt: skip
    return transformers.AyaVisionForConditionalGeneration(config), 60, 4, 16


@pytest.mark.parametrize("build", [llava, gemma3, aya_vision])
def test_images_pass_through(build):
    model, image_token, count, size = build()
    ids = torch.randint(3, 50, (2, 10))
    ids[:, 1 : 1 + count] = image_token
    batch = image_batch(ids, size)
    if build is gemma3:
        batch["token_type_ids"] = (ids == image_token).long()
    labels = alignloss.next_token_labels(ids, (torch.arange(10) > count + 2).expand(2, 10))
    check(model, batch, labels)
    towers = [p.grad for name, p in model.named_parameters() if "vision" in name or "projector" in name]
    assert any(gradient is not None and gradient.norm() > 0 for gradient in towers)


class Changed(transformers.LlamaForCausalLM):
    """A Llama that does something else to its logits."""

    def __init__(self, change):
        super().__init__(LlamaConfig(**SIZES))
        self.change, self.extra = change, nn.Parameter(torch.tensor(1.0))

    def forward(self, input_ids, attention_mask=None, **_):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.change(self, hidden))


class Normed(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden):
        return super().forward(hidden) * self.scale


def with_head(head):
    model = Changed(lambda self, hidden: self.lm_head(hidden))
    model.lm_head = head
    return model


MORE, BEHIND = "does more to its logits than scale and softcap", "has parameters behind its output embedding"
REFUSED = {
    "a bias behind": (lambda: Changed(lambda s, h: s.lm_head(h) + 1), f"{MORE}: 2 -> 3"),
    "another cap": (lambda: Changed(lambda s, h: s.lm_head(h).clamp(-30, 30)), MORE),
    "a layer behind": (lambda: Changed(lambda s, h: s.lm_head(h).flip(-1)), MORE),
    "a factor of positions": (
        lambda: Changed(lambda s, h: s.lm_head(h) * torch.arange(1, h.shape[1] + 1)[:, None]),
        "treats positions or tokens differently",
    ),
    "a column that is masked": (lambda: Changed(lambda s, h: s.lm_head(h).index_fill(-1, torch.tensor(3), -1e9)), MORE),
    "a trained factor": (lambda: Changed(lambda s, h: s.lm_head(h) * s.extra), BEHIND),
    "two calls": (lambda: Changed(lambda s, h: s.lm_head(h) + s.lm_head(h)), "called its output embedding 2 times"),
    "no call": (lambda: Changed(lambda s, h: h @ s.lm_head.weight.T), "called its output embedding 0 times"),
    "another width": (lambda: Changed(lambda s, h: s.lm_head(h)[..., :-1]), "changes the width of its logits"),
    "a normalised weight": (lambda: with_head(Normed(16, V, bias=False)), "differ from the projection .* their size"),
    "a factor in the head": (lambda: with_head(Scaled(16, V)), r"trains more than weight and bias, \['scale'\]"),
    "a head of two layers": (
        lambda: with_head(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, V))), "Sequential, has no weight"
    ),
    "no head": (lambda: transformers.LlamaModel(LlamaConfig(**SIZES)), "has no output embedding"),
    "a head on meta": (lambda: with_head(nn.Linear(16, V, bias=False, device="meta")), "on meta, a device without"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_one_projection_is_refused_by_what_it_is(what):
    build, message = REFUSED[what]
    model = build().train()
    model.model.layers[0].eval() if hasattr(model, "model") else None
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    for call in (check_model, lambda m: head_call(m, len, input_ids=torch.ones(1, 3, dtype=torch.long))):
        with pytest.raises(UnsupportedModel, match=message) as caught:
            call(model)
        assert type(model).__name__ in str(caught.value)
    assert modes == [m.training for m in model.modules()]
    assert state.equal(torch.get_rng_state())
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_frozen_factor_in_the_head_is_measured_as_a_difference():
    model = with_head(Scaled(16, V))
    model.lm_head.scale.requires_grad_(False).fill_(2.0)
    with pytest.raises(UnsupportedModel, match="differ from the projection"):
        check_model(model)


def test_the_model_is_as_it_was_after_an_error_in_the_loss():
    model = make("Llama").train()
    batch, _ = batch_of(model)
    mine = lambda hidden: hidden
    model.lm_head.forward = mine

    def broken(head):
        raise ZeroDivisionError

    with pytest.raises(UnsupportedModel):
        head_call(model, broken, **batch)
    assert model.lm_head.forward is mine
    del model.lm_head.forward
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        head_call(model, broken, **batch)
    assert "forward" not in vars(model.lm_head) and model.training and state.equal(torch.get_rng_state())
    assert model(**batch).logits.shape[-1] == V


def test_a_changed_model_is_checked_again(monkeypatch):
    from alignloss.hf import check as module

    measured, original = [], module._measured
    monkeypatch.setattr(module, "_measured", lambda *args: (measured.append(1), original(*args))[1])
    model = make("Gemma2")
    assert [check_model(model) for _ in range(3)] == [(1.0, 3.0)] * 3
    assert len(measured) == 1
    model.config.final_logit_softcapping = 5.0
    assert check_model(model) == (1.0, 5.0)
    model.resize_token_embeddings(V + 8)
    check_model(model)
    assert len(measured) == 3
    model.lm_head = Normed(16, V + 8, bias=False)
    with pytest.raises(UnsupportedModel, match="differ from the projection"):
        check_model(model)
    check_model(make("Llama"), batch_of(make("Llama"))[0])
    assert len(measured) == 5


def test_labels_belong_to_the_loss():
    model = make("Llama")
    batch, labels = batch_of(model)
    with pytest.raises(ValueError, match="labels are among the inputs"):
        head_call(model, logps_of(labels), **batch, labels=labels)


def test_hidden_states_and_head_of_ddp_are_refused(monkeypatch):
    model = make("Llama")

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(
        UnsupportedModel, match=r"LlamaForCausalLM is behind DDP.*Use head_call\(model, fn, \*\*batch\)"
    ):
        hidden_and_head(Wrapper(model), {})


def test_what_the_loss_returns_comes_back_as_it_is():
    model = make("Llama")
    batch, _ = batch_of(model)
    returned, outputs = head_call(model, lambda head: {"head": head, "n": 3, "none": None}, **batch)
    assert isinstance(returned["head"], Head) and returned["n"] == 3 and returned["none"] is None
    assert returned["head"].hidden.shape == (4, 7, 16)
    assert outputs.logits.shape == (4, 7, 1)
    with torch.no_grad():
        logps, _ = head_call(model, lambda head: head.hidden.sum(), **batch)
    assert not logps.requires_grad


def test_a_second_call_of_a_model_at_once_is_refused_and_leaves_it_as_it_was():
    model = make("Llama")
    batch, labels = batch_of(model)
    expected = model(**batch).logits
    inside, leave, problems = threading.Event(), threading.Event(), []

    def first(head):
        inside.set()
        assert leave.wait(60)
        return logps_of(labels)(head)

    def second():
        assert inside.wait(60)
        try:
            head_call(model, logps_of(labels), **batch)
        except UnsupportedModel as problem:
            problems.append(str(problem))
        leave.set()

    other = threading.Thread(target=second)
    other.start()
    ours, _ = head_call(model, first, **batch)
    other.join()
    assert len(problems) == 1 and "one call of a model at a time" in problems[0]
    assert error(ours.detach(), own_logps(expected, labels).detach()) <= 2e-5
    assert "forward" not in model.lm_head.__dict__
    assert model(**batch).logits.equal(expected)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of torch's own tracing
def test_compiled_autograd():
    model = make("Llama")
    batch, labels = batch_of(model)
    found = []
    for compiled in (False, True):
        model.zero_grad()
        ours, _ = head_call(model, logps_of(labels), **batch)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext():
            ours.sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)

"""`alignloss fit`: parameters and activations as transformers and autograd have them, and a table that adds up."""

import copy
import json
import os
import socket
import subprocess
import sys

import peft
import pytest
import torch
import transformers

from alignloss.commands import fit
from alignloss.commands.fit import MODELS, estimate, most_tokens, read_model
from alignloss.commands.fit_config import _linear_bytes

GIB = 1 << 30
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "tie_word_embeddings": False,
}

MROPE = {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}


def config_of(settings):
    # a copy: transformers writes into nested settings
    return transformers.CONFIG_MAPPING[settings["model_type"]](**copy.deepcopy(settings))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_built_in_models(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(MODELS[name]))
    assert read_model(name).parameters == model.num_parameters()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_parameters_where_a_configuration_leaves_out_what_it_may(tmp_path, family):
    settings = {
        "model_type": family, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 32, "attention_bias": True, "mlp_bias": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(settings))
    assert read_model(str(tmp_path)).parameters == model.num_parameters()


VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# the least that each says; the classes fill in the rest
MULTIMODAL = {
    "llava": {"vision_config": VISION | {"model_type": "clip_vision_model"}, "text_config": TEXT},
    "llava_next": {"vision_config": VISION | {"model_type": "clip_vision_model"}, "text_config": TEXT},
    "llava_onevision": {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "text_config": TEXT},
    "idefics3": {"vision_config": VISION, "text_config": TEXT | {"model_type": "llama"}, "pad_token_id": 0},
    "smolvlm": {"vision_config": VISION, "text_config": TEXT | {"model_type": "llama"}, "pad_token_id": 0},
    "mistral3": {
        "vision_config": VISION | {"head_dim": 16, "model_type": "pixtral"},
        "text_config": TEXT | {"model_type": "mistral"},
    },
    "internvl": {"vision_config": VISION, "text_config": TEXT, "tie_word_embeddings": False},
    "paligemma": {
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "text_config": TEXT | {"model_type": "gemma2"},
    },
    "qwen2_vl": {
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
        "text_config": TEXT,
    },
    "qwen2_5_vl": {
        "vision_config": {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4,
                          "intermediate_size": 96},
        "text_config": TEXT | {"tie_word_embeddings": True},
    },
}  # fmt: skip


def written(folder, settings):
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_parameters_of_models_that_see_images(tmp_path, kind):
    settings = MULTIMODAL[kind] | {"model_type": kind}
    model = read_model(written(tmp_path, settings))
    with torch.device("meta"):
        whole = transformers.AutoModelForImageTextToText.from_config(config_of(settings))
    assert model.parameters == whole.num_parameters()
    tower = sum(p.numel() for name, p in whole.named_parameters() if "language_model" not in name)
    tower -= sum(p.numel() for name, p in whole.named_parameters() if name.startswith("lm_head"))
    if kind not in ("idefics3", "smolvlm"):  # whose decoder is called otherwise
        assert model.beside_parameters == tower
    assert model.beside_parameters > 50_000
    full, lora = (estimate(model, 64, length=32, lora=lora) for lora in (False, True))
    assert full.weights == 2 * model.parameters
    assert full.gradients == 2 * (model.parameters - model.beside_parameters)
    assert lora.weights == 2 * model.parameters + lora.gradients


def test_nothing_is_looked_up_in_the_network(tmp_path, monkeypatch):
    def connect(*_):
        raise OSError("a network is used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    names = {"_name_or_path": "somebody/llava", "architectures": ["LlavaForConditionalGeneration"]}
    settings = MULTIMODAL["llava"] | {"model_type": "llava"} | names
    settings["text_config"] = TEXT | {"_name_or_path": "somebody/text"}
    assert read_model(written(tmp_path, settings)).layers == 2


def test_what_the_class_fills_in(tmp_path):
    model = read_model(written(tmp_path, {"model_type": "llava", "text_config": {"num_hidden_layers": 2}}))
    assert (model.family, model.hidden_size, model.layers, model.vocabulary) == ("llama", 4096, 2, 32000)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 3}')
    assert read_model(str(tmp_path)).hidden_size == transformers.Qwen2Config().hidden_size


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize(
    "more",
    [
        {"tie_word_embeddings": True},
        {"torch_dtype": "float32"},
        {"num_local_experts": 8, "num_experts": 8},
        {"layer_types": ["full_attention", "full_attention"], "num_hidden_layers": 2},
    ],
    ids=lambda more: next(iter(more)),
)
def test_keys_that_may_change_the_count(tmp_path, family, more):
    settings = TEXT | {"model_type": family} | more
    model = read_model(written(tmp_path, settings))
    with torch.device("meta"):
        assert model.parameters == transformers.AutoModelForCausalLM.from_config(config_of(settings)).num_parameters()


@pytest.mark.parametrize(
    ("key", "family"),
    [(key, family) for key in ("head_dim", "num_key_value_heads") for family in ("llama", "mistral", "qwen2", "qwen3")],
)
def test_null_is_counted_or_refused_as_transformers_has_it(tmp_path, key, family):
    settings = TEXT | {"model_type": family, key: None}
    path = written(tmp_path, settings)
    try:
        with torch.device("meta"):
            parameters = transformers.AutoModelForCausalLM.from_config(config_of(settings)).num_parameters()
    except Exception:
        parameters = None
    refused = [("head_dim", "qwen2"), ("head_dim", "qwen3"), ("num_key_value_heads", "mistral")]
    assert (parameters is None) == ((key, family) in refused)
    if parameters is None:
        with pytest.raises(ValueError, match="transformers does not"):
            read_model(path)
    else:
        assert read_model(path).parameters == parameters


def test_a_decoder_that_its_sizes_do_not_explain_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path, TEXT | {"model_type": "llama"})
    assert read_model(path).layers == 2
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "LlamaMLP", lambda config: torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"a variant that is not estimated"):
        read_model(path)


def quantized(**options):
    return TEXT | {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"} | options}


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # of a weight of 33 x 37, as bitsandbytes 0.50.2 holds it on a CPU
        ({"load_in_4bit": True}, 611 + 4 * 20 + 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 611 + 20 + 4 + 4 + 1024 + 64),
        ({"load_in_8bit": True}, 33 * 37 + 4 * 33),
    ],
)
def test_bytes_of_a_quantized_weight(options, expected):
    assert _linear_bytes(33, 37, options) == expected


def test_linear_layers_are_quantized_and_the_rest_is_not(tmp_path):
    H, I, Q, K = 64, 96, 64, 32  # noqa: E741
    linears = [(Q, H), (K, H), (K, H), (H, Q), (I, H), (I, H), (H, I)]
    rest = 2 * 400 * H + 5 * H  # embeddings, head, norms
    for options in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        model = read_model(written(tmp_path, quantized(**options)))
        quantized_bytes = 2 * sum(_linear_bytes(*size, options) for size in linears)
        assert (model.frozen_bytes(2), model.frozen_bytes(4)) == (
            2 * rest + quantized_bytes,
            4 * rest + quantized_bytes,
        )
    # as in transformers: where modules are named, those alone, which are then not the head
    skipping = {"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj"]}
    model = read_model(written(tmp_path, quantized(**skipping)))
    expected = 2 * sum(_linear_bytes(*size, skipping) for size in linears[:-1]) + _linear_bytes(400, H, skipping)
    assert model.frozen_bytes(2) == 2 * (rest - 400 * H + 2 * H * I) + expected
    step = estimate(model, 64, length=32, lora=True)
    assert step.weights == model.frozen_bytes(2) + step.gradients
    assert step.recomputed == 2 * H * I  # a matrix in 16 bits
    with pytest.raises(ValueError, match="quantized weights do not train: lora=True"):
        estimate(model, 64, length=32)


def test_where_a_quantization_stands_does_not_matter(tmp_path):
    settings, asked = MULTIMODAL["llava"] | {"model_type": "llava"}, {"quantization_config": {"load_in_4bit": True}}
    inside = settings | {"text_config": settings["text_config"] | asked}
    models = [read_model(written(tmp_path, each)) for each in (settings | asked, inside)]
    assert models[0] == models[1]


def test_an_object_that_transformers_makes_nothing_of(tmp_path):
    plain = TEXT | {"model_type": "llama"}
    assert read_model(written(tmp_path, plain | {"foo_config": {"a": 1}})) == read_model(written(tmp_path, plain))


def test_a_quantized_tower_and_the_command(tmp_path):
    settings = MULTIMODAL["llava"] | {"model_type": "llava", "quantization_config": {"load_in_4bit": True}}
    path = written(tmp_path, settings)
    model = read_model(path)
    whole = read_model(written(tmp_path, {k: v for k, v in settings.items() if k != "quantization_config"}))
    assert whole.beside_parameters == model.beside_parameters
    # the tower's linear layers: 0.5 bytes and a scale each 64
    assert model.frozen_bytes(2) < 2 * model.parameters - 2 * (4 * 64 * 64 + 2 * 64 * 96) * 1.4
    written(tmp_path, settings)
    done = command("--model", path, "--tokens", "128", "--length", "64")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "beside the decoder" in text and "quantized by bitsandbytes" in text
    assert "LoRA alloc" not in text and "full +checkpoint" not in text and "Loss layer, full" not in text


def test_without_transformers_a_plain_decoder_is_read_and_the_rest_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "installed", lambda: False)
    monkeypatch.setattr(fit, "count", None)
    assert read_model(written(tmp_path, TEXT | {"model_type": "llama"})).vocabulary == 400
    needs = ({"model_type": "llava"} | MULTIMODAL["llava"], quantized(load_in_4bit=True), {"model_type": "llama",
             "auto_map": {"AutoConfig": "code.Config"}} | TEXT)  # fmt: skip
    for settings in needs:
        with pytest.raises(ValueError, match=r"read through transformers; .* pip install '\.\[fit\]'"):
            read_model(written(tmp_path, settings))
    with pytest.raises(ValueError, match="'gptq' are not known"):
        read_model(written(tmp_path, quantized(quant_method="gptq")))
    with pytest.raises(ValueError, match="intermediate_size must be a positive integer, got None"):
        read_model(written(tmp_path, {"model_type": "llama", "hidden_size": 64}))


def saved_bytes(family, layers, lora, precision):
    """Bytes that autograd saves in the decoder, parameters left out, for 4 padded sequences of 64 tokens."""
    settings = SMALL | MROPE if family in fit._SAME_LAYERS else SMALL
    config = config_of(settings | {"model_type": family, "num_hidden_layers": layers, "use_cache": False})
    mixed = precision == "mixed"
    dtype = torch.float32 if precision == "fp32" or (mixed and not lora) else torch.bfloat16
    if family == "gemma2" and not transformers.Gemma2Model._supports_sdpa:
        pytest.skip("transformers 5.24 computes Gemma 2 by eager or flex attention alone")
    model = transformers.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if lora:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=mixed
        )
        model.enable_input_require_grads()
    mask = torch.ones(4, 64, dtype=torch.long)
    mask[0, -1] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        return saved_by(model, input_ids=torch.randint(0, 512, (4, 64)), attention_mask=mask)


def saved_by(model, **inputs):
    """Bytes that autograd saves in a call, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = {}  # keeps the storages alive, so that no address comes twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in saved.values())


def test_a_frozen_tower_leaves_nothing_for_the_backward():
    settings = MULTIMODAL["llava"] | {"model_type": "llava", "image_token_index": 399}
    settings["vision_config"] = settings["vision_config"] | {"image_size": 56, "patch_size": 14, "num_hidden_layers": 3}
    config = config_of(settings | {"vision_feature_layer": -1})
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).model
    model.requires_grad_(False)
    model.language_model.requires_grad_(True)
    ids = torch.randint(0, 399, (2, 64))
    text = saved_by(model, input_ids=ids)
    ids[:, 4:20] = 399
    image = saved_by(model, input_ids=ids, pixel_values=torch.randn(2, 3, 56, 56, dtype=torch.bfloat16))
    # where the image goes in, one mask, and its values
    assert image - text <= 2 * 64 * 64 * 3
    model.vision_tower.requires_grad_(True)
    trained = saved_by(model, input_ids=ids, pixel_values=torch.randn(2, 3, 56, 56, dtype=torch.bfloat16))
    assert trained - text > 10 * (image - text)


# PEFT asks by a name that transformers 5.24 deprecates
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("precision", ["bf16", "mixed", "fp32"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "qwen2_vl_text", "qwen2_5_vl_text"])
def test_activations_of_a_layer_within_a_tenth(tmp_path, family, lora, precision):
    settings = SMALL | (MROPE if family in fit._SAME_LAYERS else {})
    settings |= {"model_type": fit._SAME_LAYERS.get(family, family), "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = read_model(str(tmp_path))
    step = {"length": 64, "lora": lora, "rank": 8, "precision": precision}
    two, three = (estimate(model._replace(layers=n), 256, **step).activations for n in (2, 3))
    measured = saved_bytes(family, 3, lora, precision) - saved_bytes(family, 2, lora, precision)
    assert three - two == pytest.approx(measured, rel=0.1)


def test_an_8b_model_in_16_bit_by_hand():
    model = read_model("llama-3-8b")
    full = estimate(model, 4096, length=1024, checkpointing=True)
    billions = 8.030261248
    assert [x / 1e9 for x in (full.weights, full.gradients, full.optimizer)] == pytest.approx(
        [2 * billions, 2 * billions, 4 * billions]
    )
    # 32 layer inputs; the last norm keeps 4 + 2 bytes, and the loss takes 2
    assert full.activations == 4096 * 4096 * (32 * 2 + 8)
    # three fp32 tensors of logits, and the gradient of the hidden states
    assert full.full_logits_bytes == 3 * 4 * 4096 * 128256 + 2 * 4096 * 4096
    held = full.weights + full.gradients + full.optimizer + full.activations
    # the loss in one pass takes more than the backward of a layer, whose tiles are smaller otherwise
    assert full.total() == held + full.loss_bytes
    small = estimate(model, 4096, length=1024, checkpointing=True, workspace_bytes=256 << 20)
    assert small.total() == held + small.recomputed
    # q, k, v, o: 4096 or 1024 outputs; gate, up, down: 14336
    lora = estimate(model, 4096, length=1024, lora=True, rank=16)
    pairs = [8192, 5120, 5120, 8192, 18432, 18432, 18432]
    assert lora.weights == 2 * (model.parameters + 32 * 16 * sum(pairs))
    assert lora.loss_layer.regime == 2


def test_weights_of_4_bits_by_hand(tmp_path):
    model = read_model("llama-3.2-1b", qlora=True)
    linear = 16 * sum(i * o for i, o in model.linears)
    # half a byte each, a byte for the scale of 64, and theirs; embeddings, which are the head, and norms in 16 bits
    assert model.quantized_bytes == pytest.approx(linear * (1 / 2 + 1 / 64), rel=1e-3)
    assert model.quantized_parameters == linear
    step = {"length": 1024, "lora": True}
    saved = estimate(read_model("llama-3.2-1b"), 8192, **step).weights - estimate(model, 8192, **step).weights
    assert saved == 2 * linear - model.quantized_bytes
    with pytest.raises(ValueError, match="quantized already"):
        read_model(written(tmp_path, quantized(load_in_4bit=True)), qlora=True)


def test_shared_prompts_are_one_sequence_of_a_pair():
    model = read_model("qwen2.5-0.5b")
    step = {"labelled": 0.25, "checkpointing": True}
    apart = estimate(model, 8 * 1024, length=1024, **step)
    shared = estimate(model, 8 * 1024, length=1024, share_prompts=True, **step)
    # 4 pairs of 768 + 2 * 256 positions; the layers' inputs, the last norm, and what the loss is given, gathered
    assert shared.activations == 896 * (4 * 1280 * (24 * 2 + 8) + 2048 * 2)
    assert apart.activations == 896 * 8192 * (24 * 2 + 8)
    assert shared.recomputed == 4 * 1280 * model.layer_activations(1280, False, 16, "bf16")
    assert shared.loss_bytes <= apart.loss_bytes
    with pytest.raises(ValueError, match="for pairs"):
        estimate(model, 8192, length=1024, share_prompts=True, paired=False)


def test_gradients_that_are_freed_count_in_the_backward_alone():
    model = read_model("smollm2-135m")
    step = estimate(model, 512, length=256, accumulates=False, precision="fp32", device="cpu")
    held = estimate(model, 512, length=256, precision="fp32", device="cpu")
    assert step.weights == 4 * model.parameters and step.head_gradient == 4 * 49152 * 576
    early = step.activations + max(step.loss_bytes, step.recomputed)
    assert step.total() == step.weights + step.optimizer + max(step.head_gradient + early, step.gradients)
    # its gradient comes when one of three tensors of logits is left
    logits = max(step.full_logits_bytes, step.full_logits_bytes // 3 + step.head_gradient)
    assert step.total(full_logits=True) == step.weights + step.optimizer + step.activations + logits
    assert held.total() == step.weights + step.optimizer + step.gradients + early


def test_the_most_tokens_are_the_most():
    model = read_model("qwen2.5-0.5b")
    for full_logits in (False, True):
        step = {"length": 512, "checkpointing": True, "gpu_memory": 16 * GIB}
        most = most_tokens(model, 16 * GIB, full_logits, **step)
        fits = [estimate(model, n, **step).total(full_logits) <= 16 * GIB for n in (most, most + 1024)]
        assert most % 1024 == 0
        assert fits == [True, False]
    assert most_tokens(model, 1 * GIB, False, **step) == 0


def command(*arguments):
    line = [sys.executable, "-m", "alignloss.commands", "fit", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})


def test_the_command_prints_a_table():
    done = command("--model", "llama-3.2-1b", "--tokens", "8192", "--gpu-memory", "24")
    assert done.returncode == 0, done.stderr
    assert "1,236M parameters" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    (first,) = [row for row in rows if row[:2] == ["full", "alignloss"] and "14.4" in row]
    assert first[-3:] == ["23.8", "no", "6,144"]
    assert "…" not in done.stdout
    assert command("--model", "llama-3-8b", "--gpu-memory", "8").returncode == 1


@pytest.mark.nightly
def test_the_command_ends_with_whether_it_fits():
    assert command("--model", "llama-3-8b", "--gpu-memory", "16", "--qlora", "--share-prompts").returncode == 0
    assert command("--model", "llama-3.2-1b", "--train", "full", "--no-checkpointing").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-5"], "'gpt-5' is neither a config.json nor one of smollm2-135m"),
        *(
            pytest.param(["--model", "llama-3-8b", *arguments], message, marks=pytest.mark.nightly)
            for arguments, message in (
                (["--labelled", "0"], "labelled must lie in (0, 1]"),
                (["--gpu-memory", "inf"], "gpu_memory must be a positive number, got inf"),
                (["--precision", "fp8"], "precision must be 'bf16', 'mixed' or 'fp32'"),
                (["--optimizer", "lion"], "optimizer one of ['adamw'"),
            )
        ),
    ],
)
def test_bad_input_is_explained(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "it holds a list"),
        ('{"model_type": "mamba"}', "'mamba' is not estimated; those are: llama"),
        ("{}", "model type None is not"),
        ('{"model_type": "gpt-6"}', "'gpt-6' is not"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "does not take this configuration"),
        ('{"model_type": "llama", "intermediate_size": [96, 96]}', "does not take this configuration"),
        ('{"model_type": "llama", "auto_map": {"AutoConfig": "code.Config"}}', "code .* is never run"),
        ('{"model_type": "llava", "text_config": {"model_type": "llama", "auto_map": {"A": "b.C"}}}', "is never run"),
        ('{"model_type": "paligemma"}', r"'gemma' \(the decoder in a 'paligemma'\) is not estimated"),
        ('{"model_type": "gemma3"}', "'gemma3_text' .* is not estimated"),
        ('{"model_type": "mllama"}', "'mllama_text_model' .* is not estimated"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}', "'gptq' are not known"),
        ('{"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}', "'awq' are not known"),
        ('{"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}', "'fp8' are not known"),
        ('{"model_type": "qwen3", "quantization_config": {"quant_method": "mxfp4"}}', "'mxfp4' are not known"),
        ('{"model_type": "qwen3", "quantization_config": {"quant_method": "torchao"}}', "'torchao' are not known"),
        ('{"model_type": "llama", "compression_config": {"format": "dense"}}', "quantization None are not known"),
        (
            '{"model_type": "llava", "text_config": {"quantization_config": {"quant_method": "hqq"}}}',
            "'hqq' are not known",
        ),
        (
            '{"model_type": "llama", "quantization_config": {"load_in_8bit": true, "llm_int8_has_fp16_weight": true}}',
            "llm_int8_has_fp16_weight is not estimated",
        ),
        (
            '{"model_type": "llama", "quantization_config": {"load_in_4bit": true, "bnb_4bit_quant_type": "int4"}}',
            "must be nf4 or fp4, got 'int4'",
        ),
        (
            '{"model_type": "llama", "quantization_config": {"load_in_8bit": true, "llm_int8_skip_modules": "q_proj"}}',
            "llm_int8_skip_modules must be a list of names, got 'q_proj'",
        ),
        ('{"model_type": ["llama"]}', r"model_type must be a string, got \['llama'\]"),
        ("[" * 100_000, "is not JSON"),
        (
            '{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}',
            "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3",
        ),
    ],
)
def test_a_configuration_that_does_not_serve(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_model(str(path))

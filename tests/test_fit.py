"""`alignloss fit`: parameters and activations as transformers and autograd have them, and a table that adds up."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers

from alignloss.fit import MODELS, estimate, most_tokens, read_model

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


def config_of(settings):
    return transformers.CONFIG_MAPPING[settings["model_type"]](**settings)


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


def saved_bytes(family, layers, lora, mixed):
    """Bytes that autograd saves in the decoder, parameters left out, for 4 padded sequences of 64 tokens."""
    config = config_of(SMALL | {"model_type": family, "num_hidden_layers": layers, "use_cache": False})
    dtype = torch.float32 if mixed and not lora else torch.bfloat16
    model = transformers.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if lora:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=mixed
        )
        model.enable_input_require_grads()
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    mask = torch.ones(4, 64, dtype=torch.long)
    mask[0, -1] = 0
    saved = {}  # keeps the storages alive, so that no address comes twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        model(input_ids=torch.randint(0, 512, (4, 64)), attention_mask=mask)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_activations_of_a_layer_within_a_tenth(tmp_path, family, lora, mixed):
    settings = SMALL | {"model_type": family, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = read_model(str(tmp_path))
    step = {"length": 64, "lora": lora, "rank": 8, "precision": "mixed" if mixed else "bf16"}
    two, three = (estimate(model._replace(layers=n), 256, **step).activations for n in (2, 3))
    measured = saved_bytes(family, 3, lora, mixed) - saved_bytes(family, 2, lora, mixed)
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
    assert full.total() == full.weights + full.gradients + full.optimizer + full.activations + full.recomputed
    # q, k, v, o: 4096 or 1024 outputs; gate, up, down: 14336
    lora = estimate(model, 4096, length=1024, lora=True, rank=16)
    pairs = [8192, 5120, 5120, 8192, 18432, 18432, 18432]
    assert lora.weights == 2 * (model.parameters + 32 * 16 * sum(pairs))
    assert lora.loss_layer.regime == 2


def test_the_most_tokens_are_the_most():
    model = read_model("qwen2.5-0.5b")
    for full_logits in (False, True):
        step = {"length": 512, "checkpointing": True, "gpu_memory": 16 * GIB}
        most = most_tokens(model, 16 * GIB, full_logits, **step)
        fits = [estimate(model, n, **step).total(full_logits) <= 16 * GIB for n in (most, most + 1024)]
        assert most % 1024 == 0
        assert fits == [True, False]
    assert most_tokens(model, 1 * GIB, False, **step) == 0


def fit(*arguments):
    command = [sys.executable, "-m", "alignloss.cli", "fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})


def test_the_command_prints_a_table():
    done = fit("--model", "llama-3.2-1b", "--tokens", "8192", "--gpu-memory", "24")
    assert done.returncode == 0, done.stderr
    assert "1,236M parameters" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    (first,) = [row for row in rows if row[:2] == ["full", "alignloss"] and "14.4" in row]
    assert first[-3:] == ["23.8", "no", "6,144"]
    assert "…" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-5"], "'gpt-5' is neither a config.json nor one of smollm2-135m"),
        (["--model", "llama-3-8b", "--labelled", "0"], "labelled must lie in (0, 1]"),
        (["--model", "llama-3-8b", "--gpu-memory", "inf"], "gpu_memory must be a positive number, got inf"),
        (["--model", "llama-3-8b", "--precision", "fp8"], "precision must be 'bf16' or 'mixed'"),
        (["--model", "llama-3-8b", "--optimizer", "lion"], "optimizer one of ['adamw'"),
    ],
)
def test_bad_input_is_explained(arguments, message):
    done = fit(*arguments)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "it holds a list"),
        ('{"model_type": "mamba"}', "'mamba' is not estimated; those are: llama"),
        ('{"model_type": "llama", "hidden_size": 64}', "intermediate_size must be a positive integer, got None"),
    ],
)
def test_a_configuration_that_does_not_serve(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_model(str(path))

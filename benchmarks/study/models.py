"""The models of the study: how one is made, writes, is scored and takes a step, through `alignloss.hf`."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import alignloss
from alignloss.hf import head_call
from alignloss.recipes.batches import CompletionBatch, joined

from . import world
from .world import PAD, RESPONSE, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": world.EOS,
}  # fmt: skip


def make_model(seed: int) -> Any:
    """A Llama of 100,864 parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def batch_of(rows: Sequence[tuple[list[int], list[int]]]) -> CompletionBatch:
    """Prompts and completions as one batch, of a width that the prompts alone decide."""
    assert all(len(response) <= RESPONSE for _, response in rows)
    batch = joined([(torch.tensor(prompt), torch.tensor(response)) for prompt, response in rows], PAD)
    more = max(len(prompt) for prompt, _ in rows) + RESPONSE - batch.input_ids.shape[1]
    return CompletionBatch(*(nn.functional.pad(v, (0, more), value=i) for v, i in zip(batch, (PAD, 0, 0), strict=True)))


def rows_of(batch: CompletionBatch, index: Tensor) -> CompletionBatch:
    return CompletionBatch(*(value[index] for value in batch))


def in_head(model: nn.Module, batch: CompletionBatch, run: Callable[[Any], Any]) -> Any:
    """What `run` makes of hidden states and head."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    return head_call(model, run, **inputs)[0]


def logps_of(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """Sums in nats (S,), without gradients."""
    with torch.no_grad():
        score = alignloss.sequence_logprob
        return in_head(model, batch, lambda head: score(head.hidden, head.weight, batch.labels).logps)


@torch.no_grad()
def sample(model: Any, prompts: Sequence[list[int]], generator: torch.Generator) -> list[list[int]]:
    """A response to each prompt, by the model's own probabilities, up to its end or the limit."""
    responses: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in places])
        ended = torch.zeros(len(places), 1, dtype=torch.bool)
        for _ in range(RESPONSE):
            probabilities = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            words = probabilities.multinomial(1, generator=generator)
            ids, ended = torch.cat([ids, words], 1), ended | (words == world.EOS)
            if bool(ended.all()):
                break
        for i, tokens in zip(places, ids[:, length:].tolist(), strict=True):
            responses[i] = tokens[: tokens.index(world.EOS) + 1] if world.EOS in tokens else tokens
    return responses


def train(model: nn.Module, steps: int, learning_rate: float, step_loss: Callable[[int], Tensor]) -> list[float]:
    """AdamW with a tenth of the steps to warm up, then constant; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, steps // 10))
        loss = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def saved(model: nn.Module, path: Path) -> None:
    """The weights in a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{time.time_ns()}")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)


def loaded(model: nn.Module, path: Path) -> nn.Module:
    """The model with the weights in a file.

    Raises:
        SystemExit: for a file that is damaged.
    """
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # whatever its reader makes of the bytes
        raise SystemExit(f"{path} is damaged ({type(error).__name__}): remove it, and it is made again") from None
    return model


def fit_text(
    model: nn.Module, batch: CompletionBatch, steps: int, learning_rate: float, size: int, seed: int
) -> list[float]:
    """Maximum likelihood of completions, drawn with replacement."""
    loss, generator = alignloss.SFTLoss(), torch.Generator().manual_seed(seed)

    def step_loss(step: int) -> Tensor:
        rows = rows_of(batch, torch.randint(len(batch.input_ids), (size,), generator=generator))
        return in_head(model, rows, lambda head: loss(head.hidden, head.weight, rows.labels)).loss

    return train(model, steps, learning_rate, step_loss)


def pretrained(world_seed: int, steps: int, size: int = 32) -> Any:
    """A model of documents, many in a row of 64 tokens, which knows neither chat nor an end."""
    made, dice = make_model(world_seed), random.Random(f"documents {world_seed}")
    questions = world.make_world(world_seed).questions
    rows = []
    for _ in range(4096):
        tokens: list[int] = []
        while len(tokens) < 56:
            tokens += world.document(world.draw_question(questions, dice), dice)
        rows.append(tokens[:56])
    ids = torch.tensor(rows)
    fit_text(made, CompletionBatch(ids, torch.ones_like(ids), torch.ones_like(ids)), steps, 3e-3, size, world_seed)
    return made

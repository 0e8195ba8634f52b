"""Controlled sentiment: SmolLM2-135M-Instruct is aligned with what a lexicon says of its own sentences.

As in the first experiment of Rafailov et al. 2023 (arXiv:2305.18290), section 6, with VADER (Hutto and Gilbert 2014)
in place of a classifier, and a smaller model. Its three starts are the model as it is, in its chat template; the same
model continuing plain text; and that one after fine-tuning on sentences of its own which end.
"""

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alignloss.commands.training.checkpoints import write_whole
from alignloss.recipes.batches import CompletionBatch, joined

from .methods import SCENARIOS, Data, Row
from .models import fit_text, loaded, logps_of, saved

ABOUT = (
    "SmolLM2-135M-Instruct, rewarded with the score that VADER gives to the sentiment of its sentences, -1 to 1. "
    "Beta is a multiple of its default."
)
FAMILIES = {"reward": "sentiment"}
THREADS, OBJECTIVE = None, False  # all of them; it would take longer than the training
THINGS = (
    "weather", "food", "film", "bus", "hotel", "teacher", "book", "city", "garden", "phone", "concert", "doctor",
    "beach", "coffee", "museum", "neighbour", "train", "school", "party", "winter", "restaurant", "game", "house",
    "trip",
)  # fmt: skip
# the beginning of a sentence, and the same asked for in a chat
ASKED = {
    "I think the {} was": "Write one sentence about what the {} was like.",
    "My friend said that the {}": "Write one sentence in which a friend speaks of the {}.",
    "After the {} I felt": "Write one sentence about how you felt after the {}.",
    "This time the {} is": "Write one sentence about what the {} is like this time.",
}
LIMIT, CANDIDATES = 24, 8  # tokens of a response; responses to a prompt, of which two are a pair
SENTENCE = re.compile(r"[^.!?\n]*[.!?]")


class Language(NamedTuple):
    """The model's tokenizer and its two tokens."""

    tokenizer: Any
    pad: int
    eos: int

    def prompts(self, kind: str, held_out: bool) -> list[list[int]]:
        """Of a kind of start. A third of the things is held out."""
        third = len(THINGS) // 3
        things = THINGS[:third] if held_out else THINGS[third:]
        if kind != "instruct":
            return [self.tokenizer(beginning.format(thing))["input_ids"] for thing in things for beginning in ASKED]
        texts = [question.format(thing) for thing in things for question in ASKED.values()]
        chats = [[{"role": "user", "content": text}] for text in texts]
        return self.tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]

    def text(self, response: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in response if token != self.eos])

    def reward(self, prompt: Sequence[int], response: Sequence[int], kind: str) -> float:
        """VADER's compound score of the sentence, from -1 to 1."""
        beginning = self.tokenizer.decode(prompt) if kind != "instruct" else ""
        return lexicon().polarity_scores(beginning + self.text(response))["compound"]

    def sentence(self, response: Sequence[int]) -> list[int] | None:
        """The first sentence of a response, and an end; None where there is none."""
        found = SENTENCE.match(self.text(response))
        if found is None:
            return None
        return [*self.tokenizer(found.group(), add_special_tokens=False)["input_ids"], self.eos]

    @torch.no_grad()
    def write(self, model: Any, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> list[list[int]]:
        """A response to each prompt, by the model's own probabilities, up to its end or the limit."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
            written = model.generate(
                input_ids=ids, attention_mask=real, max_new_tokens=LIMIT, do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, eos_token_id=self.eos, pad_token_id=self.pad,
            )[:, width:].tolist()  # fmt: skip
        return [tokens[: tokens.index(self.eos) + 1] if self.eos in tokens else tokens for tokens in written]

    def batch(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> CompletionBatch:
        return joined([(torch.tensor(prompt), torch.tensor(response)) for prompt, response in rows], self.pad)


def _gguf() -> Path:
    from ..curves import gguf

    return gguf()


@cache
def lexicon() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@cache
def language() -> Language:
    from transformers import AutoTokenizer

    path = _gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Language(tokenizer, tokenizer.pad_token_id, tokenizer.eos_token_id)


def pretrained() -> Any:
    from transformers import AutoModelForCausalLM

    path = _gguf()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def sentences(kind: str, row: Row, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Some sentences of the untrained model after each prompt, as (prompt, response); written once."""
    path = folder / f"sentences-{kind}-{row.seed}.json"
    if not path.exists():
        tongue = language()
        prompts = [prompt for prompt in tongue.prompts(kind, held_out=False) for _ in range(CANDIDATES)]
        written = tongue.write(pretrained(), prompts, torch.Generator().manual_seed(row.seed))
        ended = [(prompt, tongue.sentence(response)) for prompt, response in zip(prompts, written, strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([pair for pair in ended if pair[1] is not None]))
    return [(prompt, response) for prompt, response in json.loads(path.read_text())]


def pairs_of(rows: list[tuple[list[int], list[int]]], kind: str) -> list[tuple[list[int], list[int], list[int]]]:
    """The sentences after each prompt with the highest and with the lowest reward, where these differ."""
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, response in rows:
        by_prompt.setdefault(tuple(prompt), []).append(response)
    found = []
    for prompt, responses in by_prompt.items():
        ranked = sorted(responses, key=lambda response: language().reward(prompt, response, kind))
        if language().reward(prompt, ranked[-1], kind) > language().reward(prompt, ranked[0], kind):
            found.append((list(prompt), ranked[-1], ranked[0]))
    return found


def starting_model(kind: str, row: Row, folder: Path) -> Any:
    """The model before alignment; that after fine-tuning from `folder` where it has been made already."""
    path = folder / f"{kind}-{row.seed}-{row.pretraining}.pt"
    model = pretrained()
    if kind != "sft":
        return model
    if path.exists():
        return loaded(model, path)
    fit_text(model, language().batch(sentences("pretrained", row, folder)), row.pretraining, 2e-5, 16, row.seed)
    saved(model, path)
    return model


def data_of(row: Row, folder: Path) -> Data:
    return _data_of(row._replace(method="", beta=0.0, learning_rate=0.0, steps=0, batch=0), folder)


@cache
def _data_of(row: Row, folder: Path) -> Data:
    tongue, kind = language(), SCENARIOS[row.scenario]
    style = "instruct" if kind == "instruct" else "pretrained"  # of the text
    chosen_of = pairs_of(sentences(style, row, folder), style)
    if len(chosen_of) < row.pairs:
        raise ValueError(f"{row.pairs} pairs are asked for; the model wrote {len(chosen_of)} that can be ranked")
    random.Random(row.seed).shuffle(chosen_of)
    prompts, chosen, rejected = (list(column) for column in zip(*chosen_of[: row.pairs], strict=True))
    pairs = tongue.batch([*zip(prompts, chosen, strict=True), *zip(prompts, rejected, strict=True)])
    start = starting_model(kind, row, folder)
    return Data(
        prompts, chosen, pairs, start, logps_of(start, pairs),
        reward=lambda i, response: (1 + tongue.reward(prompts[i], response, style)) / 2,
        write=tongue.write, batch=tongue.batch, pad=tongue.pad,
    )  # fmt: skip


def judged(model: Any, data: Data, row: Row) -> dict[str, float]:
    """What a model writes after prompts that it was not trained on, as a whole: more than the sentence of a pair."""
    tongue, kind = language(), SCENARIOS[row.scenario]
    prompts = [prompt for prompt in tongue.prompts(kind, held_out=True) for _ in range(3)]
    responses = tongue.write(model, prompts, torch.Generator().manual_seed(row.seed + 1))
    rewards = [tongue.reward(prompt, response, kind) for prompt, response in zip(prompts, responses, strict=True)]
    batch = tongue.batch(list(zip(prompts, responses, strict=True)))
    logps = logps_of(model, data.pairs)
    half = len(logps) // 2
    return {
        "reward": sum(rewards) / len(rewards),
        "kl": float((logps_of(model, batch) - logps_of(data.start, batch)).mean()),
        "chosen_logps": float(logps[:half].mean()),
        "rejected_logps": float(logps[half:].mean()),
        "length": sum(map(len, responses)) / len(responses),
        "ended": sum(tongue.eos in response for response in responses) / len(responses),
    }

"""The small model in the generated world: its starts, its pairs, and what it is worth."""

import random
from pathlib import Path
from typing import Any

import torch

from . import world
from .methods import SCENARIOS, Data, Row
from .models import batch_of, fit_text, loaded, logps_of, make_model, pretrained, sample, saved
from .world import Question

ABOUT = (
    "A model of 100,000 parameters in a generated world, whose judge gives 0 to 10. Beta is a multiple of its default."
)
# what stands for a benchmark of the paper
FAMILIES = {
    "judge": "dialogue", "addition": "mathematics", "reversal": "reasoning", "maximum": "reasoning",
    "truth": "truthfulness", "recall": "multi-task knowledge",
}  # fmt: skip
THREADS = 1  # in which equal rows give equal bits
OBJECTIVE = True


def starting_model(kind: str, seed: int, steps: int, folder: Path) -> Any:
    """The model before alignment, from `folder` where it has been made already."""
    path = folder / f"{kind}-{seed}-{steps}.pt"
    if path.exists():
        return loaded(make_model(seed), path)
    if kind == "pretrained":
        model = pretrained(seed, steps)
    else:
        model = starting_model("pretrained", seed, steps, folder)
        dice = random.Random(f"{kind} {seed}")
        questions = [world.draw_question(world.make_world(seed).seen, dice) for _ in range(2000)]
        polite = 0.15 if kind == "sft" else 1.0  # of the answers
        rows = [
            (q.prompt, world.polite_response(q, dice) if dice.random() < polite else world.chosen_response(q))
            for q in questions
        ]
        fit_text(model, batch_of(rows), steps // 3, 1e-3, 32, seed)
    saved(model, path)
    return model


def data_of(row: Row, folder: Path) -> Data:
    dice = random.Random(f"pairs {row.seed}")
    seen = world.make_world(row.seed).seen
    questions = [world.draw_question(seen, dice) for _ in range(row.pairs)]
    prompts, chosen = [q.prompt for q in questions], [world.chosen_response(q) for q in questions]
    rejected = [world.rejected_response(q, dice) for q in questions]
    pairs = batch_of([*zip(prompts, chosen, strict=True), *zip(prompts, rejected, strict=True)])
    start = starting_model(SCENARIOS[row.scenario], row.seed, row.pretraining, folder)
    return Data(
        prompts, chosen, pairs, start, logps_of(start, pairs),
        reward=lambda i, response: world.judge(questions[i], response) / 10,
        write=sample, batch=batch_of, pad=world.PAD,
    )  # fmt: skip


def judged(model: Any, data: Data, row: Row) -> dict[str, float]:
    """What a model is worth on questions that it was not trained on."""
    generator, made = torch.Generator().manual_seed(row.seed + 1), world.make_world(row.seed)
    asked = [question for question in made.held_out for _ in range(4)]
    responses = sample(model, [question.prompt for question in asked], generator)
    batch = batch_of([(q.prompt, r) for q, r in zip(asked, responses, strict=True)])
    by_task: dict[int, list[float]] = {}
    for question, response in zip(asked, responses, strict=True):
        words = [word for word in response if word not in (*world.FILLERS, world.EOS)]
        by_task.setdefault(question.task, []).append(float(tuple(words) == question.answer))
    scores = [world.judge(q, r) for q, r in zip(asked, responses, strict=True)]
    logps = logps_of(model, data.pairs)
    half = len(logps) // 2
    return {
        "judge": sum(scores) / len(scores),
        **{world.NAMES[task]: sum(hits) / len(hits) for task, hits in by_task.items() if task != world.FACT},
        "truth": preferred(model, [q for q in made.held_out if q.task == world.FACT]),
        "recall": recall(model, made.questions),
        "kl": float((logps_of(model, batch) - logps_of(data.start, batch)).mean()),
        "chosen_logps": float(logps[:half].mean()),
        "rejected_logps": float(logps[half:].mean()),
        "length": sum(map(len, responses)) / len(responses),
        "ended": sum(world.EOS in r for r in responses) / len(responses),
    }


def preferred(model: Any, questions: list[Question]) -> float:
    """The mean probability of the truth, of truth and misconception."""
    true = logps_of(model, batch_of([(q.prompt, list(q.answer)) for q in questions]))
    wrong = logps_of(model, batch_of([(q.prompt, list(q.misconception)) for q in questions]))
    return float((true - wrong).sigmoid().mean())


def recall(model: Any, questions: list[Question]) -> float:
    """The mean probability of the answer of a book, in the form of a document."""
    rows = [([world.BOOK, q.task, *q.asked, world.SAYS], list(q.answer)) for q in questions]
    return float(logps_of(model, batch_of(rows)).exp().mean())

"""One run of the study: a method in a scenario, from its row in the table, bit for bit again on a CPU."""

import copy
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import alignloss
from alignloss import CompletionBatch

from . import world
from .models import batch_of, fit_text, in_head, logps_of, make_model, pretrained, rows_of, sample, train
from .world import Question, World

SCENARIOS = {
    "after SFT": "sft",  # a pretrained model, fine-tuned, then aligned
    "without SFT": "pretrained",  # aligned at once
    "instruction-tuned": "instruct",  # a model that was tuned on another style, aligned
}
GROUP, CANDIDATES, ROUNDS, REJECTION_BETA = 4, 8, 3, 0.5


class Row(NamedTuple):
    """What a run is made of. Equal rows give equal results, in every bit, by the same versions in one thread."""

    scenario: str  # of SCENARIOS
    method: str  # of METHODS
    seed: int  # of the world, the models, the data and their order
    pairs: int
    beta: float  # times the default of the method
    learning_rate: float
    steps: int
    batch: int  # pairs of a step
    pretraining: int  # steps

    @property
    def name(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in self)


class Data(NamedTuple):
    world: World
    questions: list[Question]
    pairs: CompletionBatch  # (2B,): the chosen ones, then the rejected ones
    start: Any  # the model before alignment, and the reference
    ref_logps: Tensor  # (2B,) of the pairs


Loss = Callable[[float], alignloss.PreferenceLoss]
# with the beta of each method's paper or of its library; SLiC's is its margin, ORPO's the weight of its odds ratio
PAIRED: dict[str, Loss] = {
    "dpo": lambda beta: alignloss.DPOLoss(beta=0.1 * beta),
    "ipo": lambda beta: alignloss.IPOLoss(beta=0.1 * beta),
    "cpo": lambda beta: alignloss.CPOLoss(beta=0.1 * beta),
    "simpo": lambda beta: alignloss.SimPOLoss(beta=2.0 * beta),
    "orpo": lambda beta: alignloss.ORPOLoss(beta=0.1 * beta),
    "slic": lambda beta: alignloss.PreferenceLoss("slic", delta=1.0 * beta, nll_weight=1.0),
}


class Run:
    """A model on its way, with the sources of its randomness."""

    def __init__(self, row: Row, data: Data) -> None:
        self.row, self.data = row, data
        self.model = copy.deepcopy(data.start)
        self.generator = torch.Generator().manual_seed(row.seed)

    def train(self, steps: int, step_loss: Callable[[], Tensor]) -> None:
        train(self.model, steps, self.row.learning_rate, lambda _: step_loss())

    def places(self, count: int) -> Tensor:
        return torch.randint(count, (self.row.batch,), generator=self.generator)

    def on_pairs(
        self, loss: alignloss.PreferenceLoss, pairs: CompletionBatch, ref_logps: Tensor
    ) -> Callable[[], Tensor]:
        count = len(pairs.input_ids) // 2

        def step_loss() -> Tensor:
            chosen = self.places(count)
            return paired_loss(self.model, loss, pairs, ref_logps, torch.cat([chosen, chosen + count]))

        return step_loss


def paired_loss(
    model: nn.Module, loss: alignloss.PreferenceLoss, pairs: CompletionBatch, ref_logps: Tensor, places: Tensor
) -> Tensor:
    rows = rows_of(pairs, places)
    more = {"ref_logps": ref_logps[places]} if loss.needs_reference else {}
    return in_head(model, rows, lambda head: loss(head.hidden, head.weight, rows.labels, **more)).loss


def sft(run: Run) -> None:
    pairs = run.data.pairs
    chosen = rows_of(pairs, torch.arange(len(pairs.input_ids) // 2))
    fit_text(run.model, chosen, run.row.steps, run.row.learning_rate, run.row.batch, run.row.seed)


def paired(method: str) -> Callable[[Run], None]:
    def align(run: Run) -> None:
        loss = PAIRED[method](run.row.beta)
        run.train(run.row.steps, run.on_pairs(loss, run.data.pairs, run.data.ref_logps))

    return align


def kto_loss(
    model: nn.Module, start: nn.Module, pairs: CompletionBatch, ref_logps: Tensor, places: Tensor, beta: float
) -> Tensor:
    """Of as many desirable completions as undesirable ones, with the KL of mismatched ones."""
    loss, rows = alignloss.KTOLoss(beta=0.1 * beta), rows_of(pairs, places)
    mismatched = alignloss.mismatched_pairs(*rows, world.PAD)
    kl = alignloss.kto_kl(logps_of(model, mismatched), logps_of(start, mismatched))
    more = {"ref_logps": ref_logps[places], "desirable": places < len(pairs.input_ids) // 2, "kl": kl}
    return in_head(model, rows, lambda head: loss(head.hidden, head.weight, rows.labels, **more)).loss


def kto(run: Run) -> None:
    data, count = run.data, len(run.data.pairs.input_ids) // 2

    def step_loss() -> Tensor:
        chosen = run.places(count)
        places = torch.cat([chosen, chosen + count])
        return kto_loss(run.model, data.start, data.pairs, data.ref_logps, places, run.row.beta)

    run.train(run.row.steps, step_loss)


def rso(run: Run) -> None:
    """Pairs of the start's own responses, accepted by their score, in DPO (RSO-sigmoid-norm)."""
    data = run.data
    asked = [question for question in data.questions for _ in range(CANDIDATES)]
    responses = sample(data.start, [question.prompt for question in asked], run.generator)
    scores = torch.tensor([world.judge(q, r) / 10 for q, r in zip(asked, responses, strict=True)]).view(-1, CANDIDATES)
    kept = alignloss.rejection_sample(scores, 2, beta=REJECTION_BETA, generator=run.generator)
    better, worse = [], []
    for i, (a, b) in enumerate(kept.tolist()):
        if scores[i, a] != scores[i, b]:
            high, low = (a, b) if scores[i, a] > scores[i, b] else (b, a)
            prompt = data.questions[i].prompt
            better.append((prompt, responses[i * CANDIDATES + high]))
            worse.append((prompt, responses[i * CANDIDATES + low]))
    if better:
        pairs = batch_of(better + worse)
        loss = PAIRED["dpo"](run.row.beta)
        run.train(run.row.steps, run.on_pairs(loss, pairs, logps_of(data.start, pairs)))


def spin(run: Run) -> None:
    """Rounds of DPO between the data and what the model of the round before wrote, which is the reference."""
    prompts = [torch.tensor(question.prompt) for question in run.data.questions]
    chosen = [torch.tensor(world.chosen_response(question)) for question in run.data.questions]

    def generate(prompts: Sequence[Tensor]) -> list[Tensor]:
        return [torch.tensor(r) for r in sample(run.model, [prompt.tolist() for prompt in prompts], run.generator)]

    more = {"generate": generate, "score": lambda batch: logps_of(run.model, batch), "pad_token_id": world.PAD}
    for pairs, ref_logps in alignloss.self_play_rounds(prompts, chosen, ROUNDS, **more):
        run.train(run.row.steps // ROUNDS, run.on_pairs(PAIRED["dpo"](run.row.beta), pairs, ref_logps))


def rlhf(run: Run) -> None:
    """The judge's score less beta times log pi / pi_ref, by the gradient of its expectation, in groups of a prompt."""
    data, beta = run.data, 0.1 * run.row.beta

    def step_loss() -> Tensor:
        drawn = run.places(len(data.questions))[: max(1, run.row.batch // 2)].tolist()
        asked = [data.questions[i] for i in drawn for _ in range(GROUP)]
        responses = sample(run.model, [question.prompt for question in asked], run.generator)
        batch = batch_of([(q.prompt, r) for q, r in zip(asked, responses, strict=True)])
        scores = torch.tensor([world.judge(q, r) / 10 for q, r in zip(asked, responses, strict=True)])
        ref_logps = logps_of(data.start, batch)

        def policy_gradient(head: Any) -> Tensor:
            logps = alignloss.sequence_logprob(head.hidden, head.weight, batch.labels).logps
            rewards = (scores - beta * (logps.detach() - ref_logps)).view(-1, GROUP)
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-6)
            return -(advantages.flatten() * logps).mean()

        return in_head(run.model, batch, policy_gradient)

    run.train(run.row.steps, step_loss)


METHODS: dict[str, Callable[[Run], None]] = {
    "sft": sft,
    **{method: paired(method) for method in PAIRED},
    "kto": kto,
    "rso": rso,
    "spin": spin,
    "rlhf": rlhf,
}


def starting_model(kind: str, seed: int, steps: int, folder: Path) -> Any:
    """The model before alignment, from `folder` where it has been made already."""
    path = folder / f"{kind}-{seed}-{steps}.pt"
    if path.exists():
        model = make_model(seed)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
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
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{time.time_ns()}")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model


def data_of(row: Row, folder: Path) -> Data:
    made, dice = world.make_world(row.seed), random.Random(f"pairs {row.seed}")
    questions = [world.draw_question(made.seen, dice) for _ in range(row.pairs)]
    pairs = batch_of(
        [(q.prompt, world.chosen_response(q)) for q in questions]
        + [(q.prompt, world.rejected_response(q, dice)) for q in questions]
    )
    start = starting_model(SCENARIOS[row.scenario], row.seed, row.pretraining, folder)
    return Data(made, questions, pairs, start, logps_of(start, pairs))


_starts: dict[Row, dict[str, float]] = {}  # what the starting models of this process are worth


def execute(row: Row, folder: Path) -> dict[str, Any]:
    """Train and judge; the metrics, with those of the start under `start_`."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    data = data_of(row, folder)
    run = Run(row, data)
    METHODS[row.method](run)
    found = judged(run.model, data, row.seed) | {"objective": objective(run.model, data, row)}
    key = row._replace(method="", beta=0.0, learning_rate=0.0, steps=0, batch=0)
    if key not in _starts:
        _starts[key] = judged(data.start, data, row.seed)
    start = _starts[key] | {"objective": objective(data.start, data, row)}
    return {
        **found,
        **{f"start_{name}": value for name, value in start.items()},
        "seconds": time.perf_counter() - begun,
    }


def judged(model: Any, data: Data, seed: int) -> dict[str, float]:
    """What a model is worth on questions that it was not trained on."""
    generator = torch.Generator().manual_seed(seed + 1)
    asked = [question for question in data.world.held_out for _ in range(4)]
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
        "truth": preferred(model, [q for q in data.world.held_out if q.task == world.FACT]),
        "recall": recall(model, data.world.questions),
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


def objective(model: Any, data: Data, row: Row) -> float:
    """The method's own loss of the pairs (RSO and SPIN: DPO's); less the score for RLHF."""
    places = torch.arange(len(data.pairs.input_ids))
    with torch.no_grad():
        if row.method == "rlhf":
            asked, generator = data.questions[:128], torch.Generator().manual_seed(row.seed + 2)
            responses = sample(model, [question.prompt for question in asked], generator)
            return -sum(world.judge(q, r) / 10 for q, r in zip(asked, responses, strict=True)) / len(asked)
        if row.method == "sft":
            return -float(logps_of(model, data.pairs)[: len(places) // 2].mean())
        if row.method == "kto":
            return float(kto_loss(model, data.start, data.pairs, data.ref_logps, places, row.beta))
        loss = PAIRED[row.method if row.method in PAIRED else "dpo"](row.beta)
        return float(paired_loss(model, loss, data.pairs, data.ref_logps, places))

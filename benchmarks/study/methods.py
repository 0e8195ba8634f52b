"""The methods: what each makes of pairs, a starting model and a reward, whatever the world is that they come from."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import alignloss
from alignloss import CompletionBatch

from .models import fit_text, in_head, logps_of, rows_of, train

SCENARIOS = {
    "after SFT": "sft",  # a pretrained model, fine-tuned, then aligned
    "without SFT": "pretrained",  # aligned at once
    "instruction-tuned": "instruct",  # a model that was tuned on another style, aligned
}
# of the paper's benchmarks
FAMILIES = (
    "dialogue", "mathematics", "reasoning", "truthfulness", "question answering", "multi-task knowledge",
)  # fmt: skip
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
    """What a method trains on. The first half of `pairs` are the chosen responses."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    pairs: CompletionBatch  # (2B,)
    start: Any  # the model before alignment, and the reference
    ref_logps: Tensor  # (2B,) of the pairs
    reward: Callable[[int, list[int]], float]  # of a response to the prompt of this number, from 0 to 1
    write: Callable[[Any, list[list[int]], torch.Generator], list[list[int]]]  # a model's response to each prompt
    batch: Callable[[list[tuple[list[int], list[int]]]], CompletionBatch]  # of prompts and responses
    pad: int


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
        self.losses: list[list[float]] = []  # of each training, one or more

    def train(self, steps: int, step_loss: Callable[[], Tensor]) -> None:
        self.losses.append(train(self.model, steps, self.row.learning_rate, lambda _: step_loss()))

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
    chosen = rows_of(run.data.pairs, torch.arange(len(run.data.prompts)))
    fit_text(run.model, chosen, run.row.steps, run.row.learning_rate, run.row.batch, run.row.seed)


def paired(method: str) -> Callable[[Run], None]:
    def align(run: Run) -> None:
        loss = PAIRED[method](run.row.beta)
        run.train(run.row.steps, run.on_pairs(loss, run.data.pairs, run.data.ref_logps))

    return align


def kto_loss(model: nn.Module, data: Data, places: Tensor, beta: float) -> Tensor:
    """Of as many desirable completions as undesirable ones, with the KL of mismatched ones."""
    loss, rows = alignloss.KTOLoss(beta=0.1 * beta), rows_of(data.pairs, places)
    mismatched = alignloss.mismatched_pairs(*rows, data.pad)
    kl = alignloss.kto_kl(logps_of(model, mismatched), logps_of(data.start, mismatched))
    more = {"ref_logps": data.ref_logps[places], "desirable": places < len(data.prompts), "kl": kl}
    return in_head(model, rows, lambda head: loss(head.hidden, head.weight, rows.labels, **more)).loss


def kto(run: Run) -> None:
    count = len(run.data.prompts)

    def step_loss() -> Tensor:
        chosen = run.places(count)
        return kto_loss(run.model, run.data, torch.cat([chosen, chosen + count]), run.row.beta)

    run.train(run.row.steps, step_loss)


def rso(run: Run) -> None:
    """Pairs of the start's own responses, accepted by their reward, in DPO (RSO-sigmoid-norm)."""
    data = run.data
    prompts = [prompt for prompt in data.prompts for _ in range(CANDIDATES)]
    responses = data.write(data.start, prompts, run.generator)
    rewards = torch.tensor([data.reward(i // CANDIDATES, r) for i, r in enumerate(responses)]).view(-1, CANDIDATES)
    kept = alignloss.rejection_sample(rewards, 2, beta=REJECTION_BETA, generator=run.generator)
    better, worse = [], []
    for i, (a, b) in enumerate(kept.tolist()):
        if rewards[i, a] != rewards[i, b]:
            high, low = (a, b) if rewards[i, a] > rewards[i, b] else (b, a)
            better.append((data.prompts[i], responses[i * CANDIDATES + high]))
            worse.append((data.prompts[i], responses[i * CANDIDATES + low]))
    if better:
        pairs = data.batch(better + worse)
        loss = PAIRED["dpo"](run.row.beta)
        run.train(run.row.steps, run.on_pairs(loss, pairs, logps_of(data.start, pairs)))


def spin(run: Run) -> None:
    """Rounds of DPO between the data and what the model of the round before wrote, which is the reference."""
    data = run.data

    def generate(prompts: Sequence[Tensor]) -> list[Tensor]:
        return [torch.tensor(r) for r in data.write(run.model, [prompt.tolist() for prompt in prompts], run.generator)]

    texts = [torch.tensor(prompt) for prompt in data.prompts], [torch.tensor(response) for response in data.chosen]
    more = {"generate": generate, "score": lambda batch: logps_of(run.model, batch), "pad_token_id": data.pad}
    for pairs, ref_logps in alignloss.self_play_rounds(*texts, ROUNDS, **more):
        run.train(run.row.steps // ROUNDS, run.on_pairs(PAIRED["dpo"](run.row.beta), pairs, ref_logps))


def rlhf(run: Run) -> None:
    """The reward less beta times log pi / pi_ref, by the gradient of its expectation, in groups of a prompt."""
    data, beta = run.data, 0.1 * run.row.beta

    def step_loss() -> Tensor:
        drawn = run.places(len(data.prompts))[: max(1, run.row.batch // 2)].tolist()
        asked = [i for i in drawn for _ in range(GROUP)]
        responses = data.write(run.model, [data.prompts[i] for i in asked], run.generator)
        batch = data.batch([(data.prompts[i], r) for i, r in zip(asked, responses, strict=True)])
        scores = torch.tensor([data.reward(i, r) for i, r in zip(asked, responses, strict=True)])
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


def objective(model: Any, data: Data, row: Row) -> float:
    """The method's own loss of the pairs (RSO and SPIN: DPO's); less the reward for RLHF."""
    places = torch.arange(len(data.pairs.input_ids))
    with torch.no_grad():
        if row.method == "rlhf":
            prompts, generator = data.prompts[:128], torch.Generator().manual_seed(row.seed + 2)
            responses = data.write(model, prompts, generator)
            return -sum(data.reward(i, response) for i, response in enumerate(responses)) / len(prompts)
        if row.method == "sft":
            return -float(logps_of(model, data.pairs)[: len(places) // 2].mean())
        if row.method == "kto":
            return float(kto_loss(model, data, places, row.beta))
        loss = PAIRED[row.method if row.method in PAIRED else "dpo"](row.beta)
        return float(paired_loss(model, loss, data.pairs, data.ref_logps, places))

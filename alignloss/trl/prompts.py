"""Pairs of TRL's collator with their prompt computed once, scored into the layout that TRL's losses expect."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ..hf.prompts import SharedPrompts, share_prompts


class SharedPairs(NamedTuple):
    """Pairs behind shared prompts, and where their scores belong."""

    prompts: SharedPrompts
    places: Tensor  # (N,) flat positions of the tokens of `prompts.labels` in (2B, T - 1), as TRL aligns them

    @staticmethod
    def of(batch: dict[str, Any]) -> "SharedPairs":
        """From tensors that a trainer has moved to its device."""
        values = dict(batch)
        return SharedPairs(places=values.pop("places"), prompts=SharedPrompts(**values))

    def scattered(self, values: Tensor, rows: int, columns: int) -> Tensor:
        """Values (N,) of tokens as TRL has them, (2B, T - 1), 0 elsewhere."""
        return values.new_zeros(rows * columns).index_copy(0, self.places, values).view(rows, columns)

    def units(self) -> list[list[int]]:
        """The tokens of each pair."""
        bounds = self.prompts.cu_seqlens.tolist()
        pairs = len(bounds) // 2
        return [[*range(*bounds[i : i + 2]), *range(*bounds[i + pairs : i + pairs + 2])] for i in range(pairs)]


TEXT = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


class SharingCollator:
    """TRL's collator, whose batch has the same pairs with shared prompts beside it; `columns` are of a loss."""

    def __init__(self, collator: Any, columns: Iterable[str]) -> None:
        self.collator, self.known = collator, TEXT.union(columns)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if batch.keys() - self.known:
            raise ValueError(
                f"share_prompts computes text alone, and a batch has {sorted(batch.keys() - self.known)} beside its "
                "tokens: leave share_prompts out"
            )
        ids, real, completion = batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool()
        pairs = len(ids) // 2
        prompts = [row[seen & ~scored].tolist() for row, seen, scored in zip(ids, real, completion, strict=True)]
        completions = [row[scored].tolist() for row, scored in zip(ids, completion, strict=True)]
        different = [i for i in range(pairs) if prompts[i] != prompts[i + pairs]]
        if different:
            raise ValueError(
                f"share_prompts needs one prompt for both completions; in pair {different[0]} of a batch they differ, "
                "as a truncation that keeps the end makes them: leave share_prompts out, or raise max_length"
            )
        shared = share_prompts(
            [
                {"prompt_ids": prompts[i], "chosen_ids": completions[i], "rejected_ids": completions[i + pairs]}
                for i in range(pairs)
            ]
        )
        # a token at column c is predicted at c - 1; a completion without a prompt begins with one that is not
        places = completion[:, 1:].flatten().nonzero().squeeze(1)
        return {**batch, "shared": {**shared._asdict(), "places": places}}

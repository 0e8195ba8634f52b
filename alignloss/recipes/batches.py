"""Labels of a batch, and batches put together from prompts and completions, which run on the host, in the collator."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import INTEGERS, check_int64, check_integers, check_like, check_tensor
from ..ops.sequence import sequence_layout


def next_token_labels(
    input_ids: Tensor,  # (S, T), or packed (tokens,) or (1, tokens)
    completion_mask: Tensor,  # of the same shape, nonzero at tokens to score
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    real_sequences: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels aligned with hidden states: position t gets token t + 1 if the mask holds there, else `ignore_index`.

    The last position of every sequence predicts nothing. Same shape as `input_ids`, int64. Packed sequences need
    `cu_seqlens` here too: a (1, tokens) input without it is one sequence, scored across the borders. Repeated offsets
    are empty sequences; tokens beyond the last of `real_sequences` get `ignore_index`. On a GPU, where values are not
    validated, offsets that do not rise from 0 to the number of tokens give labels outside of every vocabulary.

    Example:
        >>> input_ids = torch.tensor([[5, 6, 7, 8]])
        >>> completion_mask = torch.tensor([[0, 0, 1, 1]])
        >>> alignloss.next_token_labels(input_ids, completion_mask)
        tensor([[-100,    7,    8, -100]])
    """
    check_integers("input_ids", input_ids)
    check_int64("ignore_index", ignore_index)
    check_like("completion_mask", completion_mask, "input_ids", input_ids)
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be (S, T) or packed (tokens,); got {tuple(input_ids.shape)}")
    offsets, _ = sequence_layout(input_ids, cu_seqlens, None, real_sequences, may_be_empty=True)
    labels = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    keep = completion_mask[..., 1:].bool()
    labels[..., :-1] = torch.where(keep, input_ids[..., 1:].long(), ignore_index)
    if offsets is None:
        return labels
    # an entry for the position before each offset, the first one for that of offset 0
    flat = torch.nn.functional.pad(labels.reshape(-1), (1, 0)).index_fill_(0, offsets.clamp(min=0), ignore_index)[1:]
    beyond = torch.arange(labels.numel(), device=labels.device) >= offsets[-1]
    flat = torch.where(beyond, torch.where(offsets[-1] < 0, -2 if ignore_index == -1 else -1, ignore_index), flat)
    return flat.view(labels.shape)


class CompletionBatch(NamedTuple):
    """Sequences of a prompt and a completion, right-padded, (S, T) each, int64."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def labels(self) -> Tensor:
        """Of the completions, as `next_token_labels` makes them."""
        return next_token_labels(self.input_ids, self.completion_mask)


def mismatched_pairs(
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T) nonzero at real tokens
    completion_mask: Tensor,  # (B, T) nonzero at completion tokens
    pad_token_id: int,
) -> CompletionBatch:
    """Put completion i - 1 (the last for i = 0) after prompt i: samples for KTO's estimate of KL(policy || reference).

    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. Neighbouring rows must have different prompts, or a pair
    is matched after all. Padding may be on either side; the result is padded on the right, and as long as the longest
    prompt with another one's completion, which may be longer than T. Runs on the host: call it in the collator.

    Raises:
        ValueError: for fewer than two sequences (a pair would match itself), shapes that differ, padding between
            tokens, or a completion that is not the end of its row, as with several turns of the assistant.

    Example:
        >>> input_ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> attention_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> completion_mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> alignloss.mismatched_pairs(input_ids, attention_mask, completion_mask, pad_token_id=0).input_ids
        tensor([[1, 5, 0],
                [4, 2, 3]])
    """
    masks = {"attention_mask": attention_mask, "completion_mask": completion_mask}
    check_integers("input_ids", input_ids)
    for name, value in masks.items():
        check_tensor(name, value)
    shapes = {tuple(t.shape) for t in (input_ids, attention_mask, completion_mask)}
    if len(shapes) != 1 or input_ids.dim() != 2:
        raise ValueError(f"input_ids, attention_mask and completion_mask must share one shape (B, T), got {shapes}")
    count = input_ids.shape[0]
    if count < 2:
        raise ValueError(f"mismatched pairs need at least 2 sequences, got {count}; raise the batch size")
    real, completion = attention_mask.bool(), completion_mask.bool() & attention_mask.bool()
    blocks = torch.nn.functional.pad(real.long(), (1, 0)).diff(dim=1).clamp(min=0).sum(1)
    if bool((blocks > 1).any()):
        raise ValueError(
            f"attention_mask must be one block in each row, with padding before or after it; row "
            f"{int((blocks > 1).nonzero()[0])} has {int(blocks.max())}"
        )
    # once a completion has begun, every real token belongs to it
    resumed = (completion.cummax(1).values & real & ~completion).any(1)
    if bool(resumed.any()):
        raise ValueError(
            f"the completion must be the end of its row; in row {int(resumed.nonzero()[0])} prompt tokens follow it. "
            "Of a conversation with several turns keep the last one as the completion, the others in the prompt"
        )
    prompts = [ids[keep] for ids, keep in zip(input_ids, real & ~completion, strict=True)]
    completions = [ids[keep] for ids, keep in zip(input_ids, completion, strict=True)]
    return joined([(prompts[i], completions[i - 1]) for i in range(count)], pad_token_id)


def self_play_pairs(
    prompts: Sequence[Tensor],  # B of (P_i,)
    completions: Sequence[Tensor],  # B of (C_i,)
    samples: Sequence[Tensor],  # B of (S_i,)
    pad_token_id: int,
) -> CompletionBatch:
    """SPIN: pairs whose chosen sequences are the data's and whose rejected ones the model wrote itself.

    Chen et al. 2024 (arXiv:2401.01335): `samples[i]` is what the model of the last iteration, the reference, generated
    after `prompts[i]`; the loss is `dpo_loss`, eq. 4.7. A sample equal to its completion gives a pair without gradient.

    Raises:
        ValueError: for lists of different lengths, or token ids that are not 1-d integers.

    Example:
        >>> prompts, completions = [torch.tensor([1, 2])], [torch.tensor([3])]
        >>> samples = [torch.tensor([4, 5])]
        >>> alignloss.self_play_pairs(prompts, completions, samples, pad_token_id=0).input_ids
        tensor([[1, 2, 3, 0],
                [1, 2, 4, 5]])
    """
    if not len(prompts) == len(completions) == len(samples) or not len(prompts):
        raise ValueError(
            "prompts, completions and samples must be as many, at least one; "
            f"got {len(prompts)}, {len(completions)} and {len(samples)}"
        )
    for tokens in (*prompts, *completions, *samples):
        check_tensor("each of prompts, completions and samples", tokens)
        if tokens.dim() != 1 or tokens.dtype not in INTEGERS:
            raise ValueError(f"token ids must be 1-d integer tensors, got {tuple(tokens.shape)} {tokens.dtype}")
    rows = [*zip(prompts, completions, strict=True), *zip(prompts, samples, strict=True)]
    return joined(rows, pad_token_id)


def joined(rows: Sequence[tuple[Tensor, Tensor]], pad_token_id: int) -> CompletionBatch:
    """Completions after their prompts."""
    try:
        pad_token_id = operator.index(pad_token_id)
    except TypeError:
        raise ValueError(f"pad_token_id must be an integer, got {pad_token_id!r}; any token id serves") from None
    check_int64("pad_token_id", pad_token_id)
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64, device=rows[0][0].device)
    attention_mask, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(completion)
        ids[i, :stop] = torch.cat([prompt, completion])
        attention_mask[i, :stop] = 1
        completion_mask[i, start:stop] = 1
    return CompletionBatch(ids, attention_mask, completion_mask)

"""Pairs whose prompt is computed once: one row of prompt, chosen and rejected completion in place of two.

Positions of the rejected completion restart after the prompt, and it does not see the chosen one. The last position of
the prompt predicts two tokens, so the rows to score are gathered, and go on packed.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..recipes.batches import joined, next_token_labels
from .check import TOLERANCE, apart, check_model, computed_in, left_as_it_is, state_of
from .head import Head, head_call, learned_prompt, sharded
from .takeover import UnsupportedModel, find_head, inside_wrappers, name_of, refusing, unwrapped

T = TypeVar("T")
PROMPT, CHOSEN, REJECTED, PADDING = range(4)
MEDIA = ("pixel", "image", "video", "audio", "input_features")  # how columns of what is no text begin
TOLERANCE_16_BIT = 5e-2  # of the largest hidden state, through every layer; of wider ones as of logits

# the state of each model, and the reach that was compared
_checked: "WeakKeyDictionary[nn.Module, tuple[str, tuple[int, int]]]" = WeakKeyDictionary()


class SharedPrompts(NamedTuple):
    """B pairs in B rows of T tokens, and the N tokens of their completions, chosen sequences first."""

    input_ids: Tensor  #: (B, T)
    position_ids: Tensor  #: (B, T)
    segments: Tensor  #: (B, T), 0 in the prompt, 1 chosen, 2 rejected, 3 padding
    token_index: Tensor  #: (N,) flat positions whose hidden states predict `labels`
    labels: Tensor  #: (N,)
    cu_seqlens: Tensor  #: (2B + 1,) offsets of the sequences in `labels`
    #: tokens of the longest row in which a scored rejected one lies behind a chosen one, and of the longest sequence of
    #: prompt and one completion: in both a model shows that it shares no prompt
    reach: tuple[int, int]

    @property
    def layout(self) -> dict[str, Any]:
        """What `sequence_logprob` and the loss modules take beside labels; a completion may be empty."""
        return {"cu_seqlens": self.cu_seqlens, "real_sequences": len(self.cu_seqlens) - 1}

    def to(self, device: torch.device | str) -> "SharedPrompts":
        moved: Any = [value.to(device) if isinstance(value, Tensor) else value for value in self]
        return SharedPrompts(*moved)

    def head_call(self, model: nn.Module, fn: Callable[[Head], T]) -> tuple[T, Any]:
        """`hf.head_call` of these pairs, whose `Head.hidden` are the N rows (N, H) that predict `labels`.

        The first batch of a model, and each with a longer row or sequence than those before (a window shows at a
        length), is run as two padded rows too, and compared.

        Raises:
            UnsupportedModel: where the two differ, and as `check_model`.
        """
        _check(model, self)
        return self._call(model, fn)

    def _call(self, model: nn.Module, fn: Callable[[Head], T]) -> tuple[T, Any]:
        return head_call(
            model,
            lambda head: fn(head._replace(hidden=head.hidden.flatten(0, 1)[self.token_index.to(head.hidden.device)])),
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            attention_mask=self._attention(model),
            use_cache=False,
        )

    def _attention(self, model: nn.Module) -> Any:
        """The mask (B, 1, T, T) that a model takes, or one for each type of its layers."""
        base: Any = unwrapped(model)
        config = base.config.get_text_config(decoder=True)
        attention = getattr(config, "_attn_implementation", None)
        if attention not in ("sdpa", "eager", "flex_attention"):
            raise UnsupportedModel(
                f"{name_of(model)} computes attention by {attention!r}, which takes no mask of its own for shared "
                'prompts: load it with attn_implementation="sdpa", or "flex_attention" on a GPU'
            )
        dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
        make = self._block_mask if attention == "flex_attention" else partial(self._mask, dtype)
        window = getattr(config, "sliding_window", None)
        types = set(getattr(config, "layer_types", None) or ())
        if not types:
            return make(window)
        unknown = types - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedModel(f"{name_of(model)} has layers of {sorted(unknown)}, which share no prompt")
        masks = {kind: make(window if kind == "sliding_attention" else None) for kind in types}
        return masks if len(masks) > 1 or "sliding_attention" in types else masks["full_attention"]

    def _seen(self, window: int | None) -> Callable[..., Tensor]:
        """Whether in rows b the positions q see the positions k, by indices that broadcast, as flex_attention asks."""
        segments, positions = self.segments, self.position_ids

        def seen(b: Tensor, head: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
            key = segments[b, k]
            visible = (q >= k) & (key != PADDING) & ((key == PROMPT) | (key == segments[b, q]))
            if window is not None:
                visible = visible & (positions[b, q] - positions[b, k] < window)
            return visible | (q == k)  # padding sees itself, or its softmax would be of nothing

        return seen

    def _mask(self, dtype: torch.dtype, window: int | None) -> Tensor:
        rows, length = (torch.arange(size, device=self.segments.device) for size in self.segments.shape)
        seen = self._seen(window)(rows[:, None, None], None, length[:, None], length)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    def _block_mask(self, window: int | None) -> Any:
        """Of the blocks that are seen, which alone are computed."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.segments.shape
        return create_block_mask(self._seen(window), rows, None, length, length, device=self.segments.device)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs as 2B rows, chosen first: tokens and attention mask (2B, T'), and where labels are predicted."""
        rows = [
            (ids[kinds == PROMPT], ids[kinds == segment])
            for segment in (CHOSEN, REJECTED)
            for ids, kinds in zip(self.input_ids, self.segments, strict=True)
        ]
        ids, attended, completion = joined(rows, pad_token_id=0)
        return ids, attended, (next_token_labels(ids, completion) != -100).flatten().nonzero().squeeze(1)


def share_prompts(
    examples: Sequence[dict[str, Any]], *, pad_token_id: int = 0, max_length: int | None = None
) -> SharedPrompts:
    """Collate pairs so that each prompt is computed once.

    A collator for a loop of one's own (`DataLoader(..., collate_fn=share_prompts)`); the whole step gains what
    prompts repeat. Its batch is run by `SharedPrompts.head_call`.

    Args:
        examples: B dictionaries with `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids. A prompt may
            be empty: then the first token of a completion is not scored, as in any layout.
        pad_token_id: any token; padding is not seen.
        max_length: tokens of prompt and completion that count, the first ones; None: all.

    Raises:
        ValueError: for no examples, or others, and for images and other media among them, which rows do not have.

    Example:
        >>> batch = share_prompts([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}])
        >>> batch.input_ids, batch.position_ids
        (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 3, 2]]))
        >>> batch.labels, batch.token_index  # the prompt's last token predicts both 7 and 9
        (tensor([7, 8, 9]), tensor([1, 2, 1]))
    """
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if not examples or not all(isinstance(e, dict) and e.keys() >= set(names) for e in examples):
        raise ValueError(f"share_prompts takes at least one example, each a dictionary with {list(names)}")
    media = sorted({key for example in examples for key in example if key.startswith(MEDIA)})
    if media:
        raise ValueError(f"share_prompts computes text alone, and the examples have {media}: use padded rows")
    pairs = []
    for example in examples:
        prompt, chosen, rejected = ([int(token) for token in example[name]] for name in names)
        prompt = prompt[:max_length]
        room = None if max_length is None else max_length - len(prompt)
        pairs.append((prompt, chosen[:room], rejected[:room]))
    width = max(1, *(sum(map(len, pair)) for pair in pairs))
    ids = torch.full((len(pairs), width), pad_token_id, dtype=torch.int64)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, PADDING)
    scored: dict[int, list[tuple[list[int], list[int]]]] = {CHOSEN: [], REJECTED: []}
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        start = 0
        for segment, tokens in ((PROMPT, prompt), (CHOSEN, chosen), (REJECTED, rejected)):
            here = slice(start, start + len(tokens))
            ids[i, here], segments[i, here] = torch.tensor(tokens, dtype=torch.int64), segment
            first = 0 if segment == PROMPT else len(prompt)
            positions[i, here] = torch.arange(first, first + len(tokens))
            if segment != PROMPT:
                before = [len(prompt) - 1, *range(start, start + len(tokens) - 1)][: len(tokens)]
                unseen = int(not prompt)  # what nothing comes before
                scored[segment].append(([i * width + at for at in before[unseen:]], tokens[unseen:]))
            start += len(tokens)
    sequences = [*scored[CHOSEN], *scored[REJECTED]]
    return SharedPrompts(
        ids,
        positions,
        segments,
        torch.tensor([at for where, _ in sequences for at in where], dtype=torch.int64),
        torch.tensor([token for _, tokens in sequences for token in tokens], dtype=torch.int64),
        torch.tensor([0, *accumulate(len(tokens) for _, tokens in sequences)]),
        (
            max(sum(map(len, pair)) if pair[1] and len(pair[2]) > 1 else 0 for pair in pairs),
            max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs),
        ),
    )


def _check(model: nn.Module, batch: SharedPrompts) -> None:
    """Hidden states of a batch, shared and as two padded rows."""
    base: Any = unwrapped(model)
    # DDP's forward broadcasts buffers, and other processes may have nothing to compare now
    inner, name = inside_wrappers(model, sharding=False), name_of(model)
    if learned_prompt(model) is not None:
        raise UnsupportedModel(f"{name} carries a learned prompt or prefix, for which rows of shared prompts have none")
    state = state_of(base, find_head(model)) + str(getattr(base.config, "_attn_implementation", None))
    before, seen = _checked.get(base, ("", (-1, -1)))
    seen = seen if before == state else (-1, -1)
    further = any(new > old for new, old in zip(batch.reach, seen, strict=True))
    if not _anywhere(further, inner, batch.input_ids.device):
        return
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModel(f"{name} takes no position_ids, with which a prompt is shared")
    batch._attention(model)  # or says that there is none
    check_model(model)
    with left_as_it_is(inner), torch.no_grad():
        ids, attended, where = batch.padded()
        expected, _ = head_call(
            inner,
            lambda head: head.hidden.flatten(0, 1)[where.to(head.hidden.device)].double(),
            input_ids=ids,
            attention_mask=attended,
            use_cache=False,
        )
        with refusing(f"{name} cannot share prompts"):
            (values, dtype), _ = batch._call(inner, lambda head: (head.hidden.double(), computed_in(head.hidden)))
    difference = apart(values, expected)
    if not difference <= TOLERANCE.get(dtype, TOLERANCE_16_BIT):
        raise UnsupportedModel(
            f"{name} cannot share prompts: its hidden states differ from those of two padded rows by {difference:.1e} "
            "of their size. It carries something from token to token beside attention, or has a mask of its own"
        )
    _checked[base] = state, (max(seen[0], batch.reach[0]), max(seen[1], batch.reach[1]))


def _anywhere(here: bool, model: nn.Module, device: torch.device) -> bool:
    """Whether something holds in any process, where the forward of a sharded model takes them all."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or sharded(model) is None:
        return here
    flag = torch.tensor(here, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)

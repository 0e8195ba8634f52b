"""The two walks over the vocabulary, tile by tile, forward and backward, over the primitives of a backend.

By what has to be differentiated (V vocabulary, N scored tokens, H hidden; a GEMM is 2 N V H FLOPs), regime

1. nothing: statistics alone, 1 GEMM;
2. hidden states alone: while the tiles pass, U = sum over v != y of exp(z_v - m) D_v W_v is accumulated too, so that
   d logp / d hidden is finished in the forward and the backward scales its rows: 2 GEMMs;
4. weight or bias as well: the forward of regime 2 (or 1), and a backward that recomputes the tiles in vocabulary slices
   with every row, so that each slice of dweight is accumulated in fp32 and rounded once: 4 GEMMs, 3 where the head
   trains alone.

Regime 3 needs the loss beside the log-probabilities: `onepass`, made of the parts below.

With the target y left out of every sum, q_v = exp(z_v - m) / s over v != y, and D_v = dz_v / d(h W_v):

    d logp / d h = (1 - p_y) (D_y W_y - sum_{v != y} q_v D_v W_v)

so every gradient is a well-scaled matrix with one factor g (1 - p_y) per row, which is applied in fp32 to rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends
from ..backends import Targets, Tokens
from ..kernels.state import REF
from .head import Options
from .sizes import Footprint, accumulation_dtype, gemm_dtype, writes_dweight
from .vocabulary import IGNORED


class Scored:
    """The scored tokens of a call, its dtypes, and what fills them."""

    def __init__(
        self,
        hidden: Tensor | None,  # (M, H); None where only its gradient is wanted
        labels: Tensor,  # (M,)
        token_index: Tensor | None,  # (N,)
        options: Options,
    ) -> None:
        self.primitives = backends.get(options.backend)
        labels, ignore_index, self.split = labels.contiguous(), options.ignore_index, options.split
        if self.split is not None:
            labels, ignore_index = self.split.local_labels(labels, ignore_index), IGNORED
        index = torch.nonzero(labels != ignore_index).squeeze(1) if options.select else token_index
        index = None if index is None else index.contiguous()
        self.tokens = Tokens(hidden, labels, index, ignore_index, options.compute_dtype)
        self.device, self.transform = labels.device, options.transform
        self.rows = labels.numel() if index is None else index.numel()
        # filled block by block
        self.labels = labels if index is None else labels.new_empty(self.rows)
        self.accum_dtype = accumulation_dtype(options.compute_dtype)
        self.gemm_dtype = gemm_dtype(options.compute_dtype, self.device.type)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.accum_dtype, device=self.device)


class Walk(Scored):
    """Scored tokens before a head: its buffers, the GEMM of a tile, and both walks."""

    def __init__(
        self,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (M,)
        token_index: Tensor | None,  # (N,)
        options: Options,
        trained_from: int = 0,
        footprint: Footprint | None = None,  # that of the operands, where it is known
    ) -> None:
        super().__init__(hidden, labels, token_index, options)
        self.hidden, self.weight, self.workspace_bytes = hidden, weight, options.workspace_bytes
        self.vocabulary, self.width = weight.shape
        indexed = self.tokens.token_index is not None
        self.footprint = footprint or options.footprint_of(hidden, weight, bias, indexed, trained_from)
        # b * linear in the accumulation dtype, of what the compute dtype holds of b
        self.bias = None
        if bias is not None:
            self.bias = bias.to(options.compute_dtype).to(self.accum_dtype) * self.transform.linear

    @property
    def sized_direct(self) -> bool:
        """Whether sizes may count on `writes_dweight`: not where the parts of other processes may lie otherwise."""
        return self.split is None and writes_dweight(self.weight)

    def tile_view(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        """The tile (rows, columns) in a buffer (..., at least rows x pitch of the columns)."""
        shape, strides = buffer.shape[:-1], buffer.stride()[:-1]
        return buffer.as_strided((*shape, rows, columns), (*strides, self.footprint.pitch(columns), 1))

    def row_buffer(self, block: int) -> Tensor | None:
        return self.empty(block, self.width, dtype=self.gemm_dtype) if self.footprint.copies_rows else None

    def weight_buffer(self, columns: int) -> Tensor | None:
        return self.empty(columns, self.width, dtype=self.gemm_dtype) if self.footprint.casts_weight else None

    def weight_slice(self, first: int, last: int, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            return self.weight[first:last]
        part, compute_dtype = self.weight[first:last], self.tokens.compute_dtype
        # the copy rounds to the dtype of the GEMM, unless that is wider than the one to compute in
        return buffer[: last - first].copy_(part if compute_dtype == self.gemm_dtype else part.to(compute_dtype))

    def product_tile(self, rows: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """h W_slice^T * linear in the accumulation dtype: logits but for the bias, which the primitives add."""
        addmm(out, rows, weight.T, beta=0, alpha=self.transform.linear)
        return out

    def bias_slice(self, first: int, last: int) -> Tensor | None:
        """Of b * linear, for the logits of a slice."""
        return None if self.bias is None else self.bias[first:last]

    def forward(
        self,
        state: Tensor,  # (9, N or more); filled
        outputs: list[Tensor | None],  # logps and STATS, (M,); filled
        stats: int,
        dlogp: Tensor | None,  # (N or more, H); filled
        dentropy: Tensor | None,  # (N or more, H); filled
        held: "HeldTiles | None" = None,  # keeps the tiles
        recomputed: bool = False,  # a backward will recompute them
    ) -> None:
        """From hidden states to `outputs`: block by block of the rows, and for each slice by slice of the vocabulary.

        A tile of logits is one GEMM. It is folded into the running sums of its rows, and what is left of it, the
        exponentials, is multiplied by the slice again into U where a derivative is wanted: at the end of a block the
        sums and U are all that its results need. Some GEMMs write the exponentials themselves.
        """
        if self.rows == 0:
            return
        primitives, transform = self.primitives, self.transform
        derivatives = (dlogp is not None) + (dentropy is not None)
        block, columns = self._forward_tile(stats, derivatives, recomputed, held)
        written = self.footprint.writes_exponentials(stats, derivatives)
        in_place = held is not None and (held.in_place or written)
        fused = not derivatives and not self.footprint.casts_weight
        fused &= not (recomputed and self.footprint.recomputes_exactly)
        reference = written and transform.cap is None  # what a softcap bounds is relative to 0
        targets = Targets(self.weight, self.bias, transform.linear, reference) if fused or written else None
        row_buffer = self.row_buffer(block)
        weight_buffer = tile = scratch = accumulators = None
        for start in range(0, self.rows, block):
            part = slice(start, min(start + block, self.rows))
            count = part.stop - start
            labels, sums = self.labels[part], state[:, part]
            copy = None if row_buffer is None else row_buffer[:count]
            rows = self.hidden[part] if copy is None else copy
            primitives.gather(self.tokens, part, labels, copy, sums, targets)
            u = u2 = None
            if not self.vocabulary:  # a part may be empty
                u, u2 = ((self.empty(count, self.width).zero_() if i < derivatives else None) for i in range(2))
            elif not fused or not primitives.statistics(
                rows, self.weight, self.bias, labels, sums, transform, stats, self.workspace_bytes
            ):
                if tile is None:
                    cells = block * self.footprint.pitch(columns)
                    tile = self.empty(cells * (not in_place), dtype=self.gemm_dtype if written else None)
                    scratch = self.empty(self.footprint.fold_scratch(stats, derivatives), cells)
                    weight_buffer = self.weight_buffer(columns)
                    accumulators = self.empty(derivatives, block, self.width)
                assert scratch is not None and accumulators is not None
                u, u2 = (accumulators[i, :count] if i < derivatives else None for i in range(2))
                for first in range(0, self.vocabulary, columns):
                    last = min(first + columns, self.vocabulary)
                    weight = self.weight_slice(first, last, weight_buffer)
                    keep = None if held is None else held.tile(first, last)
                    if keep is not None and in_place:
                        x, keep = keep, None
                    else:
                        x = self.tile_view(tile, count, last - first)
                    begun = (u, u2) if first else (None, None)
                    exps = x
                    if written:
                        primitives.exponentials(rows, weight, labels, sums, begun[0], x, first, transform)
                    else:
                        self.product_tile(rows, weight, x)
                        bias, spare = self.bias_slice(first, last), self.tile_view(scratch, count, last - first)
                        exps, z_exps = primitives.fold(
                            x, bias, spare, sums, labels, first, transform, stats, derivatives, *begun,
                            self.gemm_dtype, keep,
                        )  # fmt: skip
                        if u2 is not None:
                            addmm(u2, z_exps, weight, beta=int(first > 0))
                    if held is not None:
                        held.references[first // columns].copy_(sums[REF])
                    if u is not None:
                        addmm(u, exps, weight, beta=int(first > 0))
            found = [None if t is None else t[part] for t in (dlogp, dentropy)]
            self._finish(part, labels, sums, u, u2, outputs, found)

    def _forward_tile(
        self, stats: int, derivatives: int, recomputed: bool, held: "HeldTiles | None"
    ) -> tuple[int, int]:
        if held is not None:
            return self.rows, held.columns
        of_call = derivatives, self.workspace_bytes, recomputed, self.sized_direct
        block, columns, _ = self.footprint.forward_tile(self.rows, stats, *of_call)
        return block, columns

    def _finish(
        self,
        part: slice,
        labels: Tensor,
        sums: Tensor,
        u: Tensor | None,
        u2: Tensor | None,
        outputs: list[Tensor | None],
        found: list[Tensor | None],  # dlogp and dentropy, (C, H); filled
    ) -> None:
        """The results of a block from its sums; of a split vocabulary in plain torch: its passes over U are little
        beside the way of U to the other processes."""
        of = self.weight, self.transform
        if self.split is None:
            self.primitives.finish(self.tokens, part, labels, sums, u, u2, *of, outputs, *found)
            return
        primitives = backends.get("torch")
        self.split.combine(labels, sums, u, u2)
        if u is not None:
            primitives.derivatives(self.tokens, labels, sums, u, u2, *of, u, u2)
            for whole, rounded in zip((u, u2), found, strict=True):
                if whole is not None and rounded is not None:
                    self.split.add_up(whole)
                    rounded.copy_(whole)
        primitives.results(self.tokens, part, labels, sums, self.split.total, self.transform, outputs)

    def backward(
        self,
        upstream: "Upstream",
        dweight: Tensor,  # (V, H) of the columns that train, of the weight's dtype or of the accumulation, or empty
        dbias: Tensor,  # (V,) or empty; both filled
        add: bool,  # or added to what they hold, in the accumulation dtype
        stats: int,  # of the forward, as the next
        derivatives: int,
    ) -> None:
        """From upstream gradients to those of the head: slice by slice of the vocabulary, and for each block by block.

        The tile of logits is computed again, becomes their gradient in place, and is multiplied by the rows, weighed
        by their coefficients, into the slice of dweight, which no other slice adds to.
        """
        primitives, transform = self.primitives, self.transform
        need_dweight, need_dbias = dweight.dim() == 2, dbias.numel() > 0
        if self.rows == 0:
            if not add:
                dweight.zero_()
                dbias.zero_()
            return

        if self.gemm_dtype == torch.float16:
            upstream.find_unit()
        elif not self.vocabulary:
            upstream.weigh(slice(0, self.rows))

        written = writes_dweight(dweight if need_dweight else self.weight)
        assert not add or (written and upstream.unit is None)
        # where logits have to be those of the forward, its tile: that knew the weight and not how its gradient lies
        direct = self.sized_direct if self.footprint.recomputes_exactly else written
        (block, columns, _), direct = self.footprint.backward_tile(
            self.rows, stats, derivatives, direct, self.workspace_bytes, rounded=dweight.is_contiguous()
        )
        direct |= written
        weight_buffer = self.weight_buffer(columns)
        row_buffer = self.row_buffer(block)
        scaled_buffer = self.empty(block, self.width, dtype=self.gemm_dtype)
        cells = block * self.footprint.pitch(columns)
        tile, scratch = self.empty(cells), self.empty(self.footprint.dlogits_scratch(upstream.mix is not None), cells)
        partial = self.empty(columns, self.footprint.trained_width) if need_dweight and not direct else None
        for first in range(0, self.vocabulary, columns):
            last = min(first + columns, self.vocabulary)
            w = self.weight_slice(first, last, weight_buffer)
            dw = dweight[first:last] if partial is None else partial[: last - first]
            for start in range(0, self.rows, block):
                part = slice(start, min(start + block, self.rows))
                count, beta = part.stop - start, int(start > 0 or add)
                copy = None if row_buffer is None else row_buffer[:count]
                rows, scaled = self.hidden[part] if copy is None else copy, scaled_buffer[:count]
                if first == 0 or block < self.rows:
                    upstream.weigh(part, copy, scaled)
                x = self.product_tile(rows, w, self.tile_view(tile, count, last - first))
                bias, spare = self.bias_slice(first, last), self.tile_view(scratch, count, last - first)
                coefficient = upstream.coefficient[part]
                mix = None if upstream.mix is None else upstream.mix[:, part]
                dz = primitives.dlogits(
                    x, bias, spare, upstream.state[:, part], self.labels[part], first, transform, coefficient, mix,
                    self.gemm_dtype,
                )  # fmt: skip
                if need_dweight:
                    addmm(dw, dz.T, scaled[:, self.footprint.trained_from :], beta=beta)
                if need_dbias:
                    addmm(dbias[None, first:last], coefficient[None].to(self.gemm_dtype), dz, beta=beta)
            if upstream.unit is not None and need_dweight:
                dw.mul_(upstream.unit)
            if partial is not None:
                dweight[first:last] = dw
        if upstream.unit is not None:
            dbias.mul_(upstream.unit)


class HeldTiles:
    """The tiles of a walk, kept as exponentials in the dtype of the GEMM, with the references they are relative to."""

    def __init__(self, walk: Walk, tiles: Tensor, stats: int) -> None:
        self.walk = walk
        self.columns = walk.footprint.held_columns(max(walk.rows, 1), stats)
        self.tiles = tiles  # room for N rows of V entries
        self.references = walk.empty(-(-walk.vocabulary // self.columns), walk.rows)
        self.in_place = walk.gemm_dtype == walk.accum_dtype  # logits are computed where they are held

    def tile(self, first: int, last: int) -> Tensor:
        return self.walk.tile_view(self.tiles[self.walk.rows * first :], self.walk.rows, last - first)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First vocabulary entry, exponentials and references of each tile."""
        for first, reference in zip(range(0, self.walk.vocabulary, self.columns), self.references, strict=True):
            yield first, self.tile(first, min(first + self.columns, self.walk.vocabulary)), reference


class Upstream:
    """The rows of a backward: their coefficients, and dhidden, which is filled the first time that a row is weighed."""

    def __init__(
        self,
        scored: Scored,
        state: Tensor,  # (9, N or more)
        dlogps: Tensor,  # (M,)
        dentropies: Tensor | None = None,  # (M,)
        dlogp: Tensor | None = None,  # (N or more, H) or empty
        dentropy: Tensor | None = None,  # (N or more, H) or empty
        dhidden: Tensor | None = None,  # (M, H) or empty
        coefficient: Tensor | None = None,  # (N,), where they are kept
    ) -> None:
        self.scored, self.state = scored, state
        self.dlogps, self.dentropies = dlogps, dentropies
        self.dlogp, self.dentropy, self.dhidden = (
            None if t is None or t.dim() < 2 else t for t in (dlogp, dentropy, dhidden)
        )
        self.coefficient = scored.empty(scored.rows) if coefficient is None else coefficient
        self.mix = None if dentropies is None else scored.empty(3, scored.rows)
        self.unit: Tensor | None = None
        self.filled = scored.rows if self.dhidden is None else 0

    def find_unit(self) -> Tensor:
        """A power of two to go round a GEMM in fp16, whose range the coefficients of a scaled loss may leave."""
        self.weigh(slice(0, self.scored.rows))
        self.unit = power_of_two(self.coefficient)
        return self.unit

    def weigh(self, part: slice, rows: Tensor | None = None, scaled: Tensor | None = None) -> None:
        """Fill coefficients, mix and dhidden of a part, and on request its hidden rows, as they are and weighed."""
        if part.start == part.stop:
            return
        fill = part.start >= self.filled
        self.filled = max(self.filled, part.stop)
        of = self.scored
        of.primitives.weigh(
            of.tokens,
            part,
            of.labels[part],
            self.state[:, part],
            of.transform,
            self.dlogps,
            self.dentropies,
            self.coefficient[part],
            None if self.mix is None else self.mix[:, part],
            self.unit,
            self.dlogp[part] if fill and self.dlogp is not None else None,
            self.dentropy[part] if fill and self.dentropy is not None else None,
            self.dhidden if fill else None,
            rows,
            scaled,
        )


def addmm(out: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> None:
    """out = beta out + alpha a b, accumulated in the dtype of `out`, which may be wider than that of a and b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif _ADDMM_TAKES_A_WIDE_BASE:
        torch.addmm(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    elif beta == 0:
        torch.mm(a, b, out.dtype, out=out).mul_(alpha)
    else:
        out.mul_(beta).add_(torch.mm(a, b, out.dtype), alpha=alpha)


_ADDMM_TAKES_A_WIDE_BASE = torch.__version__ >= "2.10"  # pytorch/pytorch#167931


def power_of_two(values: Tensor) -> Tensor:
    """The least power of two that no value exceeds in size, 0-d, at least 2^-100."""
    return values.abs().amax().clamp(min=2.0**-100).log2().ceil().exp2()

"""Passes of the exact top-k over whole tensors on their device; the counts of a pass are read back together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsesoup.core import topk_passes
from sparsesoup.core.errors import UserError
from sparsesoup.core.topk_passes import Bracket, Window, common_precision, sample_stride


class TensorPasses:
    """Passes over whole tensors on their device; a pass reads back once, and once more to gather."""

    def __init__(self, scores: Sequence[Tensor], alive: Sequence[Tensor] | None) -> None:
        precision = common_precision(scores)
        self._precision = torch.float32 if precision == torch.uint8 else precision
        self._shapes = [s.shape for s in scores]
        self._flat = [s.detach().reshape(-1) for s in scores]
        self._alive: list[Tensor | None] = [a.reshape(-1) for a in alive] if alive else [None] * len(scores)

    def count_alive(self) -> int:
        if self._alive[0] is None:
            return sum(s.numel() for s in self._flat)
        return int(torch.stack([torch.count_nonzero(a) for a in self._alive if a is not None]).sum())

    def window_above(self, window: Window | None, value: Tensor) -> Window:
        top = torch.full_like(value, torch.inf)
        return torch.nextafter(value, top), window[1] if window else top

    def window_below(self, window: Window | None, value: Tensor) -> Window:
        bottom = torch.full_like(value, -torch.inf)
        return window[0] if window else bottom, torch.nextafter(value, bottom)

    def bracket(self, window: Window | None, share: float, inside: int, narrow: bool) -> Window:
        sample, count = self._sample(window, inside)
        ordered = sample.sort(descending=True).values
        position = torch.minimum((share * count).long(), count - 1)
        slack = (
            (topk_passes.SLACK * (count * share * (1 - share)).sqrt()).long() + 1
            if narrow
            else torch.zeros_like(position)
        )
        ends = torch.minimum(torch.stack([position + slack, position - slack]), count - 1).clamp(min=0)
        low, high = ordered.index_select(0, ends).unbind()
        return low, high

    def split(self, low: Tensor, high: Tensor, most: int) -> Bracket:
        masks, counts, sizes = [], [], [s.numel() for s in self._flat]
        inner = torch.empty(sum(sizes), dtype=torch.bool, device=low.device)
        for flat, alive, within in zip(self._flat, self._alive, inner.split(sizes), strict=True):
            score = flat.to(self._precision)
            larger = score > high
            torch.ge(score, low, out=within)
            within ^= larger
            if alive is not None:
                larger &= alive
                within &= alive
            masks.append(larger)
            counts += [torch.count_nonzero(larger), torch.count_nonzero(within)]
        *numbers, one_value = torch.stack([*counts, (low == high).long()]).tolist()
        above, inside = sum(numbers[::2]), sum(numbers[1::2])
        masks = [mask.view(shape) for mask, shape in zip(masks, self._shapes, strict=True)]
        if one_value or inside > most:
            return Bracket(masks, above, inside, bool(one_value), low, None, [])
        parts = inner.nonzero().flatten().split(numbers[1::2])
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        positions = [part - start for part, start in zip(parts, starts, strict=True)]
        values = [s.take(p).to(self._precision) for s, p in zip(self._flat, positions, strict=True)]
        return Bracket(masks, above, inside, False, low, positions, values)

    def equal_to(self, level: Tensor) -> list[Tensor]:
        same = [flat.to(self._precision) == level for flat in self._flat]
        same = [s if a is None else s & a for s, a in zip(same, self._alive, strict=True)]
        return [mask.view(shape) for mask, shape in zip(same, self._shapes, strict=True)]

    def keep_first_(self, masks: Sequence[Tensor], count: int) -> None:
        left: Tensor | int = count
        for mask in masks:
            rank = mask.view(-1).cumsum(0, dtype=torch.int32).view(mask.shape)
            mask &= rank <= left
            left = left - torch.count_nonzero(mask)

    def _sample(self, window: Window | None, inside: int) -> tuple[Tensor, Tensor]:
        """Return a sample, -inf where a score is not alive, and the number of those alive."""
        stride = max(1, inside // topk_passes.SAMPLE)
        scores = [flat.to(self._precision) for flat in self._flat] if window else self._flat
        if window is None:
            stride = sample_stride(inside)
            sample = torch.cat([s[::stride].to(self._precision) for s in scores])
            alive = [a[::stride] for a in self._alive if a is not None]
            if not alive:
                return sample, torch.tensor(len(sample), device=sample.device)
            return sample.masked_fill(~torch.cat(alive), -torch.inf), torch.count_nonzero(torch.cat(alive))
        inner = [(s >= window[0]) & (s <= window[1]) for s in scores]
        inner = [i if a is None else i & a for i, a in zip(inner, self._alive, strict=True)]
        sample = torch.cat([s[i][::stride] for s, i in zip(scores, inner, strict=True)])
        if not len(sample):
            raise UserError("scores have NaN")
        return sample, torch.tensor(len(sample), device=sample.device)

"""Weights of a layer's matrices in float32, where they are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from models.checkpoint import not_finite
from models.device import has_kernels
from models.expert_weights import check_finite
from models.experts import RoutedExperts
from models.fp8_upload import Fp8Matrix, Fp8Upload, fp8_matrix
from models.source_formats import Source
from quant.linears import Linear

READERS = 4  # threads that read weights for a GPU


class LayerWeights:
    """Reads the matrices of one `source` to `device`."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self.upload = Fp8Upload(device) if has_kernels(device) else None
        self.sums: list[tuple[str, torch.Tensor]] = []  # not yet asked

    @property
    def asks_once(self) -> bool:
        """Whether many matrices are asked at once: on a GPU each would wait for all before it."""
        return self.device.type == "cuda"

    def one(self, linear: Linear) -> torch.Tensor:
        """A matrix in float32, [out, in]. InputError when it is not finite, on a GPU only at
        `demand_finite`."""
        if not linear.stacked:
            return self._checked(
                linear, self.source.read(linear.logical, torch.float32, self.device)
            )
        assert linear.place.expert is not None
        value = self.source.read_expert(
            linear.logical, linear.place.expert, torch.float32, self.device
        )
        value = self._checked(linear, value)
        value = value.T if linear.transposed else value
        return value if linear.rows is None else value[slice(*linear.rows)].contiguous()

    def _checked(self, linear: Linear, value: torch.Tensor) -> torch.Tensor:
        if not self.asks_once:
            return check_finite(value, linear.logical, self.source)
        # finite when all values are
        self.sums.append((linear.logical, value.sum(dtype=torch.float64)))
        return value

    def demand_finite(self) -> None:
        """InputError when a matrix that was read since the last call is not finite."""
        sums, self.sums = self.sums, []
        if not sums:
            return
        finite = torch.isfinite(torch.stack([value for _, value in sums])).tolist()
        for (name, _), well in zip(sums, finite, strict=True):
            if not well:
                raise not_finite(name, self.source.checkpoint)

    def stacked(
        self,
        experts: Sequence[int],
        stacks: Sequence[Sequence[Linear]],
        loaded: RoutedExperts | None,
        *,
        down: bool,
    ) -> torch.Tensor:
        """Float32 weights [B, N, K] of the experts' `stacks`: matrices one below the other.

        On a GPU where the layer is loaded its own weights serve, in the type it was run in: to
        read 11 GB of a layer a second time would take as long as to round it.
        """
        if self.device.type == "cuda" and loaded is not None:
            weights = loaded.weights
            assert weights is not None
            joined = weights.down_for_mm if down else weights.up_for_mm
            return joined[list(experts)].mT.float().contiguous()
        rows, columns = sum(linear.shape[0] for linear in stacks[0]), stacks[0][0].shape[1]
        weight_BNK = torch.empty((len(stacks), rows, columns), device=self.device)
        uploaded: list[Fp8Matrix] = []
        read: list[tuple[Linear, torch.Tensor]] = []
        for stack, weight in zip(stacks, weight_BNK, strict=True):
            outs = weight.split([linear.shape[0] for linear in stack])
            for linear, out in zip(stack, outs, strict=True):
                matrix = None
                if self.upload is not None and not linear.stacked:
                    matrix = fp8_matrix(self.source, linear.logical, out)
                if matrix is None:
                    read.append((linear, out))
                else:
                    uploaded.append(matrix)
        if self.upload is not None:
            self.upload.run(self.source.checkpoint, uploaded)
        values = self.read([linear for linear, _ in read])
        for (_, out), value in zip(read, values, strict=True):
            out.copy_(value)
        return weight_BNK

    def read(self, linears: Sequence[Linear]) -> Iterator[torch.Tensor]:
        """Matrices in float32; for a GPU several are on their way at once.

        InputError, on a GPU behind the last of them, when one is not finite.
        """
        if self.device.type != "cuda":
            yield from map(self.one, linears)
        else:
            # kernels start on a thread's own device
            here = torch.cuda.current_device() if self.device.index is None else self.device.index
            start = partial(torch.cuda.set_device, here)
            with ThreadPoolExecutor(READERS, initializer=start) as pool:
                yield from pool.map(self.one, linears)
        self.demand_finite()

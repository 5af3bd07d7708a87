"""The walk of a token set through a model, one decoder layer in memory.

    walk = LayerWalk(skeleton, tokens, hidden_states, batch_tokens)
    walk.embed()
    for layer in range(walk.num_layers):
        walk.run(layer, observe)

The caller owns the loop: what happens between layers (saving sums, rounding weights, snapshots)
is written where it happens. `observe` gets what the experts of this layer computed together with
the batch it came from. There are no hooks and no events.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from calibration.batches import Batch, cut, make_batch
from calibration.carries import carries_of
from calibration.hidden_states import HiddenStates
from calibration.packing import check_packable, cut_packed, pack_batch
from calibration.tokens import TokenSet
from models.device import sent
from models.errors import InputError
from models.experts import RoutedBatch
from models.layer_slot import Carry, LayerCall
from models.needs import SNAPSHOT_SHARE
from models.processes import ALONE, Processes
from models.skeleton import Skeleton

BatchObserver = Callable[[RoutedBatch, Batch], None]
CarryObserver = Callable[[Batch, Carry], None]


class LayerWalk:
    """Every batch of `tokens` through `skeleton`, layer by layer.

    `hidden_states` holds what is between layers. Layer numbers are the checkpoint's. `pack` puts
    samples into rows without padding (packing.py); InputError for a model that cannot. Of several
    `processes` each runs the batches of `own`: one of every round of as many batches as processes.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: TokenSet,
        hidden_states: HiddenStates,
        batch_tokens: int,
        *,
        pack: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        if pack:
            check_packable(skeleton.spec)
        self.pack = pack
        self.skeleton, self.tokens, self.hidden_states = skeleton, tokens, hidden_states
        self.carries = carries_of(hidden_states, skeleton.device)
        self.cuts = (cut_packed if pack else cut)(tokens, batch_tokens)
        self.processes = processes
        self.own = range(processes.rank, len(self.cuts), processes.size)
        self.num_layers = len(skeleton.layers)
        self.num_tokens = sum(tokens.lengths())
        self._asking: torch.cuda.Stream | None = None
        if skeleton.device.type == "cuda":
            self._asking = torch.cuda.Stream(skeleton.device, priority=-1)
            self._asking.wait_stream(torch.cuda.current_stream(skeleton.device))

    def batch(self, number: int) -> Batch:
        """Batch `number`, built anew each time (token ids are small, all batches are not)."""
        return (pack_batch if self.pack else make_batch)(self.tokens, self.cuts[number])

    def _on_device(
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Ids, mask and positions, as `Skeleton` takes them."""
        device, mask, positions = self.skeleton.device, batch.attention_mask, batch.position_ids
        return (
            sent(batch.input_ids, device),
            None if mask is None else sent(mask, device),
            None if positions is None else sent(positions, device),
        )

    def embed(self) -> None:
        """Token ids of every batch -> what enters layer 0."""
        self.skeleton.load_embedding()
        for number in self.own:
            inputs = self._on_device(self.batch(number))
            self.carries.put(0, number, self.skeleton.embed(*inputs))
        self.carries.settle()
        self.skeleton.unload_embedding()

    def run(
        self,
        layer: int,
        observe: BatchObserver | None = None,
        left: CarryObserver | None = None,
        before_freed: Callable[[], None] | None = None,
    ) -> None:
        """Every batch through decoder layer `layer`; the layer is loaded and freed here.

        `left` sees what left the layer for a batch, after `observe` saw its experts; `before_freed`
        is called behind the last batch, the layer still loaded.

        Raises InputError when weights are missing or hold NaN, or when what leaves the layer
        is not finite.
        """
        skeleton = self.skeleton
        current: list[Batch] = []

        def observe_routed(record: RoutedBatch) -> None:
            if observe is not None:
                observe(record, current[0])

        skeleton.load_layer(layer, observe_routed if observe is not None else None)
        skeleton.prefetch_layer(layer + 1)
        self.pass_through(layer, current, keep_output=True, last_pass=True, left=left)
        if before_freed is not None:
            before_freed()
        skeleton.unload_layer(layer)

    def pass_through(
        self,
        layer: int,
        current: list[Batch],
        *,
        keep_output: bool,
        last_pass: bool = False,
        left: CarryObserver | None = None,
        after_round: Callable[[], None] | None = None,
    ) -> None:
        """Every batch through the loaded layer. `current` holds the batch that is running.

        `keep_output` stores what enters the next layer; without `last_pass` what entered this
        one stays for another pass. `after_round` is called equally often in all processes.
        """
        finite: list[torch.Tensor] = []
        entering = self.carries.entering(layer, self.own, keep=not last_pass)
        for number, carry in zip(self.own, entering, strict=True):
            batch = self.batch(number)
            current[:] = [batch]
            leaving = self.through(layer, batch, carry)
            finite.append(tokens_are_finite(batch, leaving["hidden_states"]))
            if not finite[-1].is_cuda:  # asking a GPU would wait for it
                check_finite(layer, finite)
            if left is not None:
                left(batch, leaving)
            if keep_output:
                self.carries.put(layer + 1, number, leaving)
            if after_round is not None:
                after_round()
        if after_round is not None and len(self.own) * self.processes.size < len(self.cuts):
            after_round()  # the last round had no batch for this process
        check_finite(layer, finite)
        self.carries.settle()

    def through(self, layer: int, batch: Batch, carry: Carry) -> Carry:
        """What leaves the loaded layer for `carry`, which entered it on the device."""
        return self.skeleton.run_layer(layer, self._call(layer, batch), carry)

    def _call(self, layer: int, batch: Batch) -> LayerCall:
        """What transformers' forward gives the layer with this batch. It asks masks and positions
        what is in them; on a GPU that is done beside the batch before, not behind it."""
        if self._asking is None:
            return self.skeleton.call(layer, *self._on_device(batch))
        with torch.cuda.stream(self._asking):
            call = self.skeleton.call(layer, *self._on_device(batch))
        running = torch.cuda.current_stream(self.skeleton.device)
        running.wait_stream(self._asking)
        for tensor in call.tensors():
            tensor.record_stream(running)
        return call

    def snapshot(self, layer: int) -> list[str]:
        """Write what enters `layer` to disk; the digest of each batch's file, in all processes."""
        return self.processes.gather_dealt(self.hidden_states.snapshot(layer))

    def forget_before(self, layer: int) -> None:
        """Delete what entered the layers before `layer`; every process is past them."""
        if self.processes.is_first:
            self.hidden_states.forget_before(layer)

    def forget_used(self, layer: int) -> None:
        """The same, but for what a later run would begin with. Of several processes others may
        still read files of a layer that this one is past: they wait for the next snapshot."""
        if self.processes.size == 1:
            self.hidden_states.forget_before(layer, but=self.hidden_states.saved)


def tokens_are_finite(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """Whether every token's row is finite, where `hidden` is; padding rows may hold anything."""
    rows = hidden.reshape(len(batch.domain_T), -1)
    largest_T = torch.linalg.vector_norm(rows, torch.inf, dim=-1)
    return (torch.isfinite(largest_T) | ~batch.real_on(hidden.device)).all()


def check_finite(layer: int, finite: list[torch.Tensor]) -> None:
    """InputError unless `tokens_are_finite` said so of all batches."""
    if finite and not torch.stack(finite).all():
        raise InputError(
            f"hidden states are not finite after layer {layer} although its weights are; "
            "run with --dtype float32"
        )


class SnapshotClock:
    """Says when hidden states are worth saving: when what saving took last time is less than
    `share` of the work since, so that it costs that share at most and a kill loses little. A job
    that saves two streams halves it for each."""

    def __init__(self, share: float = SNAPSHOT_SHARE) -> None:
        self.share = share
        self.last_cost = 0.0
        self.since = time.monotonic()
        self.warned = False  # that there is no room

    def due(self) -> bool:
        """True when a snapshot should be taken now."""
        return (time.monotonic() - self.since) * self.share >= self.last_cost

    def took(self, seconds: float) -> None:
        """Note what the snapshot cost; its end starts the next interval."""
        self.last_cost = seconds
        self.since = time.monotonic()

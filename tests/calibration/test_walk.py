"""Batches, hidden states and the walk: nothing lost, nothing mixed, whatever is spilled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration.batches import PADDING, cut, make_batches
from calibration.carries import carries_of
from calibration.hidden_states import HiddenStates, num_bytes
from calibration.stream import LayerWalk, tokens_are_finite
from models.errors import InputError
from models.opening import open_model
from models.skeleton import Skeleton
from tests.tiny import reference_model, text_of, tiny_model
from tests.tiny_configs import CONFIGS
from tests.token_sets import LENGTHS, random_token_set


@pytest.mark.parametrize("batch_tokens", [1, 40, 64, 10**6])
def test_batches_hold_every_token_once(batch_tokens: int) -> None:
    tokens = random_token_set(99)
    seen = []
    for batch in make_batches(tokens, batch_tokens):
        assert batch.input_ids.numel() <= batch_tokens or len(batch.samples) == 1
        domain_BS = batch.domain_T.view(batch.input_ids.shape)
        for row, sample in enumerate(batch.samples):
            length = LENGTHS[sample]
            seen.append(sample)
            assert torch.equal(batch.input_ids[row, :length].int(), tokens.sample(sample))
            assert (domain_BS[row, :length] == tokens.domain[sample]).all()
            assert (domain_BS[row, length:] == PADDING).all()
            mask = batch.attention_mask
            assert mask is None or int(mask[row].sum()) == length
            assert mask is not None or length == batch.input_ids.shape[1]
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_like_lengths_share_a_batch() -> None:
    lengths = [len(samples) for samples in cut(random_token_set(99), 60)]
    assert sum(lengths) == len(LENGTHS)
    padded = [b for b in make_batches(random_token_set(99), 60) if b.attention_mask is not None]
    wasted = sum(b.input_ids.numel() - b.num_tokens for b in padded)
    assert wasted < sum(LENGTHS) / 2


def carry(value: float) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.full((2, 3), value, dtype=torch.bfloat16),
        "prev_topk_indices": torch.full((2, 3), int(value)),
    }


def test_hidden_states_spill_beyond_the_budget(tmp_path: Path) -> None:
    size = sum(t.nbytes for t in carry(0).values())
    states = HiddenStates(tmp_path, budget=2 * size)
    for batch in range(4):
        states.put(0, batch, carry(batch))
    assert states.held_bytes == 2 * size
    assert states.spilled_bytes == 2 * size
    for batch in range(4):
        got = states.take(0, batch)
        assert got.keys() == carry(0).keys()
        assert all(torch.equal(got[name], carry(batch)[name]) for name in got)
    assert states.held_bytes == 0


def test_a_snapshot_is_found_by_the_next_process(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, budget=None)
    for batch in range(3):
        states.put(5, batch, carry(batch))
    states.snapshot(5)
    later = HiddenStates(tmp_path, budget=None)
    assert all(
        torch.equal(later.take(5, batch)["hidden_states"], carry(batch)["hidden_states"])
        for batch in range(3)
    )
    states.forget_before(6)
    with pytest.raises(InputError, match="--force"):
        HiddenStates(tmp_path, budget=None).take(5, 0)


def test_a_changed_file_of_a_snapshot_is_refused(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, budget=num_bytes(carry(0)))
    for batch in range(3):
        states.put(5, batch, carry(batch))
    digests = states.snapshot(5)
    assert len(set(digests)) == 3
    file = tmp_path / "layer_00005" / "batch_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    later = HiddenStates(tmp_path, budget=None)
    later.expect(5, digests)
    assert torch.equal(later.take(5, 2)["hidden_states"], carry(2)["hidden_states"])
    with pytest.raises(InputError, match="not what this job wrote"):
        later.take(5, 1)
    file.write_bytes(data[:40])
    with pytest.raises(InputError, match="cannot be read"):
        later.take(5, 1)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "deepseek_v4", "qwen3_next"])
def test_walk_in_batches_equals_samples_alone(family: str, tmp_path: Path) -> None:
    """What leaves the last layer gives every sample the logits it has alone, unpadded."""
    # with few heads many indexer scores are exactly 0, and which of equal keys torch.topk takes
    # depends on the width of the batch: 16 heads leave no ties
    heads = {"index_n_heads": 16} if "index_n_heads" in text_of(CONFIGS[family]) else {}
    path = tiny_model(family, tmp_path / "model", **heads)
    opened = open_model(path)
    tokens = random_token_set(opened.spec.text["vocab_size"])
    skeleton = Skeleton(opened.source, dtype=torch.float32)
    states = HiddenStates(tmp_path / "hidden", budget=10_000)
    walk = LayerWalk(skeleton, tokens, states, batch_tokens=64)
    walk.embed()
    for layer in range(walk.num_layers):
        walk.run(layer)
        states.forget_before(layer + 1)
    skeleton.load_head()
    whole = reference_model(path, attention=None)
    for number in range(len(walk.cuts)):
        batch = walk.batch(number)
        logits = skeleton.logits(states.take(walk.num_layers, number))
        for row, sample in enumerate(batch.samples):
            ids = tokens.sample(sample)[None].long()
            with torch.inference_mode():
                alone = whole(input_ids=ids, use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, : LENGTHS[sample]], alone, rtol=1e-4, atol=1e-4)


def test_a_kept_carry_is_there_again(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, budget=num_bytes(carry(0)))
    for batch in range(2):  # the second one goes to disk
        states.put(0, batch, carry(batch))
    for batch in (0, 1, 0, 1):
        assert int(states.take(0, batch, keep=True)["prev_topk_indices"][0, 0]) == batch
    assert states.held_bytes == num_bytes(carry(0))
    assert states.spilled_bytes == num_bytes(carry(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_tokens_must_be_finite(dtype: torch.dtype) -> None:
    padded = next(b for b in make_batches(random_token_set(99), 60) if b.attention_mask is not None)
    assert padded.attention_mask is not None
    hidden = torch.full((*padded.input_ids.shape, 8), 3e38, dtype=dtype)  # sums would overflow
    assert tokens_are_finite(padded, hidden)
    for bad in (torch.inf, -torch.inf, torch.nan):
        broken = hidden.clone()
        broken[..., 5][padded.attention_mask == 0] = bad
        assert tokens_are_finite(padded, broken)
        broken[0, 0, 3] = bad
        assert not tokens_are_finite(padded, broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
@pytest.mark.parametrize("budget", [None, 3 << 20, 0])
def test_carries_pass_a_gpu_unchanged(budget: int | None, tmp_path: Path) -> None:
    """Layers that add 1 on a busy GPU, two passes over the first one; sizes grow and shrink."""
    device = torch.device("cuda")
    states = HiddenStates(tmp_path, budget)
    carries = carries_of(states, device)
    busy = torch.randn(2048, 2048, device=device)
    rows = [700, 1, 900, 300, 1000, 5]

    def first(batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        hidden = torch.randn(rows[batch], 512, generator=generator).bfloat16()
        return {"hidden_states": hidden, "chosen": torch.arange(rows[batch], dtype=torch.int32)}

    for batch in range(len(rows)):
        carries.put(0, batch, {name: value.to(device) for name, value in first(batch).items()})
    carries.settle()
    for layer, store in ((0, False), (0, True), (1, True), (2, True)):
        entering = carries.entering(layer, range(len(rows)), keep=not store)
        for batch, carry_in in enumerate(entering):
            with torch.inference_mode():
                for _ in range(4):
                    busy @ busy
                leaving = {name: value + 1 for name, value in carry_in.items()}
            assert all(value.is_cuda for value in carry_in.values())
            if store:
                carries.put(layer + 1, batch, leaving)
        carries.settle()
    for batch in range(len(rows)):
        got, expected = states.take(3, batch), first(batch)
        for _ in range(3):
            expected = {name: value + 1 for name, value in expected.items()}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_what_fails_beside_a_gpu_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    carries = carries_of(HiddenStates(blocked, budget=0), torch.device("cuda"))
    carries.put(0, 0, {"hidden_states": torch.ones(4, 4, device="cuda")})
    with pytest.raises(InputError, match="cannot be written"):
        carries.settle()
    with pytest.raises(InputError, match="missing"):
        next(carries.entering(0, [0], keep=False))

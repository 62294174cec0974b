"""Who attends: what is refused, what a measurement chooses, and that all ranks choose the same."""

import pytest
import torch
import torch.distributed as dist

from ettin_foundry.model import backends
from ettin_foundry.model.backends import candidates, choose, fastest, milliseconds
from ettin_foundry.model.config import EttinConfig

NANO = EttinConfig.for_size("nano", causal=False, max_position_embeddings=64)
IN_BF16 = "cuda", torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU with torch 2.11 and without flash-attn, as far as the choice looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    return monkeypatch


def test_what_a_gpu_offers_and_wishes_that_cannot_be_met(gpu):
    cases = ("auto", True), ("auto", False), ("flash", True), ("flex", True)
    assert [candidates(wish, *IN_BF16, compiled)[0] for wish, compiled in cases] == [
        ["varlen_attn", "flex_attention"], ["varlen_attn"], ["varlen_attn"], ["flex_attention"]]
    assert candidates("auto", "cuda", torch.float32, True)[0] == ["reference"]
    for wish, device, compiled, words in (
            ("flash", "cpu", True, "got 'flash'.*CUDA"), ("flex", "cuda", False, "got 'flex'.*model.compile: blocks"),
            ("flahs", "cuda", True, "must be auto, flash, flex or reference, got 'flahs'")):
        with pytest.raises(ValueError, match=words):
            candidates(wish, device, torch.bfloat16, compiled)


def test_the_fastest_is_taken_in_each_kind_of_layer_and_what_raises_is_left_out():
    times = {("a", True): 1.0, ("b", True): 2.0, ("a", False): 3.0, ("b", False): 2.5}
    names, why = fastest(["broken", "a", "b"], lambda *case: times[case])
    assert names == {True: "a", False: "b"} and "broken is left out of local layers: KeyError" in why
    assert fastest(["broken"], lambda *case: times[case])[0] == {True: "reference", False: "reference"}


def test_all_ranks_take_what_the_first_one_measured_and_deterministic_runs_a_rule(gpu):
    store = dist.HashStore()
    gpu.setattr(dist, "is_initialized", lambda: True)
    gpu.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    for rank, ms in ((0, 1.0), (1, 9.0)):  # the second rank would choose otherwise
        gpu.setattr(dist, "get_rank", lambda rank=rank: rank)
        gpu.setattr(backends, "milliseconds", lambda case, *_, ms=ms: ms if case == ("flex_attention", False) else 5.0)
        choose.__wrapped__.cache_clear()
        assert choose("auto", *IN_BF16, NANO, True, False) == {True: "varlen_attn", False: "flex_attention"}
    assert choose("auto", *IN_BF16, NANO, True, True) == {True: "varlen_attn", False: "varlen_attn"}


def test_a_measurement_draws_nothing_from_the_generator_of_the_run():
    state = torch.get_rng_state()
    with torch.no_grad():
        assert milliseconds(("reference", False), NANO, "cpu", torch.float32, numbers=2**14) > 0
    assert torch.equal(state, torch.get_rng_state())

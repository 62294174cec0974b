"""Who attends: what is refused, what a measurement chooses, and that all ranks choose the same."""

import pytest
import torch
import torch.distributed as dist

from ettin_foundry.model import backends
from ettin_foundry.model.attention import attention
from ettin_foundry.model.backends import candidates, choose, fastest, milliseconds
from ettin_foundry.model.config import EttinConfig

NANO = EttinConfig.for_size("nano", causal=False, max_position_embeddings=64)
IN_BF16 = "cuda", torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU with torch 2.11 and flash-attn 2, as far as the choice looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(backends, "find_spec", lambda name: name == "flash_attn")
    return monkeypatch


def test_what_a_gpu_offers_and_wishes_that_cannot_be_met(gpu):
    flash, flex = ["flash_attn_2", "varlen_attn"], ["flex_attention"]
    for wish, compiled, expected in (("auto", True, flash + flex), ("auto", False, flash), ("flash", True, flash),
                                     ("flex", True, flex)):
        assert candidates(wish, *IN_BF16, compiled)[0] == expected
    assert candidates("auto", "cuda", torch.float32, True)[0] == ["reference"]
    for wish, device, compiled, words in (
            ("flash", "cpu", True, "got 'flash'.*CUDA"), ("flex", "cuda", False, "got 'flex'.*model.compile: blocks"),
            ("flahs", "cuda", True, "must be auto, flash, flex or reference, got 'flahs'")):
        with pytest.raises(ValueError, match=words):
            candidates(wish, device, torch.bfloat16, compiled)


def test_all_ranks_take_the_fastest_that_the_first_one_measured_and_deterministic_runs_a_rule(gpu):
    store, measured = dist.HashStore(), {("varlen_attn", True): 1.0, ("flex_attention", True): 2.0,
                                         ("varlen_attn", False): 2.0, ("flex_attention", False): 1.0}
    gpu.setattr(dist, "is_initialized", lambda: True)
    gpu.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    for rank, sign in ((0, 1), (1, -1)):  # the second would choose otherwise
        gpu.setattr(dist, "get_rank", lambda rank=rank: rank)
        gpu.setattr(backends, "milliseconds", lambda case, *_, sign=sign: sign * measured[case])  # flash-attn 2 raises
        choose.cache_clear()
        assert choose("auto", *IN_BF16, NANO, True, False) == {True: "varlen_attn", False: "flex_attention"}
    assert choose("auto", *IN_BF16, NANO, True, True) == {True: "flash_attn_2", False: "flash_attn_2"}
    assert backends.fastest(["flash_attn_2"], lambda *case: measured[case])[0][False] == "reference"


def test_a_measurement_draws_nothing_from_the_generator_of_the_run():
    state = torch.get_rng_state()
    assert milliseconds(("reference", False), NANO, "cpu", torch.float32, numbers=2**14) > 0
    assert torch.equal(state, torch.get_rng_state())


def test_what_gives_other_numbers_than_the_reference_is_left_out(monkeypatch):
    def changed(q, k, v, documents, window, name="reference"):
        return attention(q, k, v, documents, (window[0] - (name == "wrong" and window[0] > 0), window[1]))

    monkeypatch.setattr(backends, "attention", changed)  # "wrong" sees one key less in local layers
    config = EttinConfig.for_size("nano", causal=False, max_position_embeddings=512)
    for name in ("right", "wrong"):
        names, why = fastest([name], lambda *case: milliseconds(case, config, "cpu", torch.float32, numbers=1))
        assert names == {True: name, False: {"right": "right", "wrong": "reference"}[name]}, why
        assert ("off the reference path" in why) is (name == "wrong")

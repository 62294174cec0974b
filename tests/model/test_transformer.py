"""Claims about the model: isolation of documents, initialisation, no read-back. Parameters: test_recipes.py."""

import pytest
import torch

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.transformer import Ettin

LENGTHS = [1, 200, 17, 64, 150]


def build(causal=False, **overrides):
    torch.manual_seed(0)
    model = Ettin(EttinConfig.for_size("nano", causal=causal, vocab_size=320, **overrides)).eval()
    with torch.no_grad():  # at the initial 0.02 every logit is near 0 and a mistake would hide under the tolerance
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def stream(lengths, seed=0):
    ids = torch.randint(0, 320, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return ids, positions, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


def targets(lengths, causal, seed=1):
    """(positions, labels) in the stream: next token for clm, every third token for mlm."""
    ids, positions, cu_seqlens, _ = stream(lengths)
    if causal:
        places = torch.cat([torch.arange(s, e - 1) for s, e in zip(cu_seqlens[:-1], cu_seqlens[1:])])
        return places, ids[places + 1]
    places = torch.arange(0, len(ids), 3)
    return places, torch.randint(0, 320, (len(places),), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True], ids=["mlm", "clm"])
def test_packed_document_equals_document_alone_in_logits_and_gradients(causal):
    model = build(causal)
    ids, positions, cu_seqlens, longest = stream(LENGTHS)
    places, labels = targets(LENGTHS, causal)
    packed = model.predict(model(ids, positions, cu_seqlens, longest))
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        own = (places >= start) & (places < end)
        borders = torch.tensor([0, end - start], dtype=torch.int32)
        alone_args = (ids[start:end], positions[start:end], borders, end - start)
        # fp32 sums of up to 320 terms of size 1 in another order
        torch.testing.assert_close(packed[start:end], model.predict(model(*alone_args)), rtol=1e-5, atol=1e-5)
        grads = []
        for args, at, to in (((ids, positions, cu_seqlens, longest), places[own], labels[own]),
                             (alone_args, places[own] - start, labels[own])):
            model.zero_grad()
            model(*args, at, to).nll.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for packed_grad, alone_grad in zip(*grads):
            assert (packed_grad - alone_grad).abs().max() <= 1e-5 * max(1.0, alone_grad.abs().max())


def test_a_stream_of_either_kind_equals_a_model_of_that_kind():
    """One model's two ways of attention against two models of one kind each with the same weights."""
    pair = {False: build(), True: build(causal=True)}
    *tensors, longest = stream(LENGTHS)
    for causal, alone in pair.items():
        for model in pair.values():
            out = model(*tensors, longest, causal=causal)
            torch.testing.assert_close(out, alone(*tensors, longest), rtol=1e-5, atol=1e-5)  # sums in other threads


def test_initialisation_follows_the_role_of_each_matrix():
    pair = []
    for causal in (False, True):
        torch.manual_seed(0)
        pair.append(Ettin(EttinConfig.for_size("17m", causal=causal)))
    out_std, shrink = 0.02 / (2 * 7) ** 0.5, 0.8796  # deviation of a standard normal cut at +-2
    for (name, p), twin in zip(pair[0].named_parameters(), pair[1].parameters()):
        assert torch.equal(p, twin)  # a pair of one seed starts from the same weights
        if name == "output_bias":
            assert p.abs().max() == 0
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:
            std = out_std if name.endswith("Wo.weight") else 0.02
            assert p.abs().max() <= 2 * std
            assert p.std().item() == pytest.approx(std * shrink, rel=0.02)  # 65,536 draws or more: 0.3% is one sigma


@pytest.mark.parametrize("causal", [False, True], ids=["mlm", "clm"])
def test_forward_and_loss_read_nothing_back_from_the_device(causal):
    """On `meta` there is no value to read: .item(), a branch on a tensor or a data-dependent shape raises."""
    with torch.device("meta"):
        model = Ettin(EttinConfig.for_size("nano", causal=causal)).train()
    *tensors, longest = stream(LENGTHS)
    tensors, of_targets = ([x.to("meta") for x in part] for part in (tensors, targets(LENGTHS, causal)))
    assert model(*tensors, longest).shape == (sum(LENGTHS), 128)
    model(*tensors, longest, *of_targets).nll.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize(("overrides", "message"), [
    ({"vocab_sizee": 3}, "vocab_sizee.*valid keys are.*vocab_size"), ({"hidden_size": 100}, "hidden_size.*got 100"),
    ({"local_attention": 127}, "local_attention.*127"), ({"window_left": 63}, "window_left must be 64.*got 63"),
    ({"attn_out_dropout": 1.0}, "attn_out_dropout.*1.0"), ({"vocab_size": True}, "vocab_size.*True"),
    ({"local_rope_theta": -1.0}, "local_rope_theta"), ({"size": "big"}, "model.size must be one of nano, 17m.*'big'")])
def test_bad_config_is_refused_by_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        EttinConfig.for_size(**{"size": "nano", "causal": False, **overrides})


def test_fsdp2_draws_meta_parameters_by_role_and_never_rounds_the_angles(monkeypatch, no_process_group):
    """One process over gloo: parameters start on `meta`, are sharded, made and drawn; blocks compute in bf16."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    import ettin_foundry.model.transformer as module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.device("meta"):
        model = Ettin(EttinConfig.for_size("nano", causal=False, vocab_size=320))
    for part in (*model.trunk.layers, model):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    model.to_empty(device="cpu")
    model.apply(module.init_parameters)
    assert model.trunk.layers[2].mlp.Wi.weight.full_tensor().std().item() == pytest.approx(0.02 * 0.8796, rel=0.05)
    assert model.output_bias.full_tensor().abs().max() == 0
    seen, rotate = [], module._rotate
    monkeypatch.setattr(module, "_rotate", lambda x, *angle: seen.append((x.dtype, angle[0].dtype))
                        or rotate(x, *angle))
    model(*stream(LENGTHS), *targets(LENGTHS, causal=False)).nll.backward()
    assert seen == [(torch.bfloat16, torch.float32)] * 4
    assert all(p.grad is not None for p in model.parameters())
    dist.destroy_process_group()


@pytest.mark.parametrize("causal", [False, True], ids=["mlm", "clm"])
def test_autocast_in_bf16_stays_close_and_keeps_the_residual_stream_in_fp32(causal):
    torch.manual_seed(0)
    model, found = Ettin(EttinConfig.for_size("nano", causal=causal, vocab_size=320)), []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            hidden = model(*stream(LENGTHS))
            model(*stream(LENGTHS), *targets(LENGTHS, causal)).nll.backward()
        assert hidden.dtype == torch.float32  # in bf16, curves of small models lie above those in fp32
        found.append([hidden.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters()])])
    for exact, rounded in zip(*found):  # a rounding to bf16 is up to 0.4%, and each product adds one
        assert (rounded - exact).norm() < 0.01 * exact.norm()

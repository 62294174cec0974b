"""StableAdamW over 4 ranks (gloo): FSDP2 equals one rank in float64; replicas under DDP stay bit-equal."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from composer.core import Timestamp
from nano_run import collectives
from test_optimizer import Formula
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ettin_foundry.training import optimizer as optim
from ettin_foundry.training.clock import Clock

RANKS, STEPS, LR, DECAY = 4, 5, 0.01, 0.1  # 4 ranks: 5 rows are cut 2 + 2 + 1 + 0, and 4 rows 1 each


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False)).to(dtype)


def batch(step, rank):
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + rank)) * (20 if step == 2 else 1)


def loss_of(network, x):
    return network(x).square().mean()


def train(rank, network, optimizer):
    """`STEPS` steps beside the formula."""
    reference = model(torch.float64)
    formulas = [Formula(p, DECAY, LR) for p in reference.parameters()]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(network, batch(step, rank))
        loss.register_hook(lambda gradient: gradient / RANKS)  # FSDP2 of torch 2.7 sums under gloo; NCCL averages
        loss.backward()
        mean = torch.stack([loss_of(reference, batch(step, r).double()) for r in range(RANKS)]).mean()
        expected = torch.autograd.grad(mean, list(reference.parameters()))
        for p, g in zip(network.parameters(), expected):
            # float32 against float64: rounding of gradients of the order of 1
            torch.testing.assert_close(p.grad.full_tensor().double(), g, rtol=1e-4, atol=1e-5)
        optimizer.step()
        with torch.no_grad():
            for formula, p, g in zip(formulas, reference.parameters(), expected):
                formula.step(g, LR)
                p.copy_(formula.p)
    assert any(formula.clipped for formula in formulas)
    for p, formula in zip(network.parameters(), formulas):
        # float32 against float64; an update is 0.01 where the moments' ratio is 1; that ratio doubles rounding errors
        torch.testing.assert_close(p.full_tensor().detach().double(), formula.p, rtol=1e-4, atol=2e-5)


def sharded(rank):
    network = model()
    optimizer = optim.StableAdamW(network.parameters(), LR, weight_decay=DECAY)
    names = {p: name for name, p in network.named_parameters()}
    order = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    fully_shard(network, mesh=init_device_mesh("cpu", (RANKS,)))
    for group, group_names in zip(optimizer.param_groups, order):  # as Composer does after it wraps a model
        group["params"] = [network.get_parameter(name) for name in group_names]
    return network, optimizer


def fsdp2(rank):
    network, optimizer = sharded(rank)
    assert next(network.parameters()).to_local().shape[0] == (2, 2, 1, 0)[rank]
    train(rank, network, optimizer)
    for options in (states.StateDictOptions(), states.StateDictOptions(full_state_dict=True)):
        other, resumed = sharded(rank)
        saved = copy.deepcopy((states.get_model_state_dict(network, options=options),  # else tensors are shared
                               states.get_optimizer_state_dict(network, optimizer, options=options)))
        states.set_model_state_dict(other, saved[0], options=options)
        states.set_optimizer_state_dict(other, resumed, saved[1], options=options)
        for one, own in ((network, optimizer), (other, resumed)):
            own.zero_grad()
            with torch.autograd.profiler.profile() as profile:
                loss_of(one, batch(7, rank)).backward()
                own.step()
            assert collectives(profile) == {"allgather_base": 1, "reduce_scatter_base": 1, "allreduce": 2}  # groups
        for a, b in zip(network.parameters(), other.parameters()):
            assert torch.equal(a.to_local(), b.to_local())
        assert [int(g["step"]) for g in resumed.param_groups] == [int(g["step"]) for g in optimizer.param_groups]
    return network


def stopped_together(rank, network):
    """An infinite gradient in the shard of one rank stops all of them."""
    clock, state = Clock({}), SimpleNamespace(
        model=network, run_name="r", previous_timestamp=Timestamp(), total_loss_dict={"loss/train/total": 1.0})
    for bad in (False, True):
        if bad and rank == 1:
            next(network.parameters()).grad.to_local()[0, 0] = float("inf")
        clock.after_train_batch(state, None)
        with pytest.raises(ValueError, match="gradients must be finite") if bad else contextlib.nullcontext():
            clock.batch_end(state, None)


def replicas(rank):
    """50 steps of DDP, each rank on rows of its own."""
    network = nn.parallel.DistributedDataParallel(model())
    optimizer = optim.StableAdamW(network.parameters(), LR, weight_decay=DECAY)
    for step in range(50):
        optimizer.zero_grad()
        with torch.autograd.profiler.profile(step == 2) as profile:  # in the step before, it agrees on its bucket
            loss_of(network, batch(step, rank)).backward()
            optimizer.step()
        assert step != 2 or collectives(profile) == {"allreduce": 1}
    mine = torch.cat([p.detach().flatten() for p in network.parameters()])
    mine = torch.cat([mine, *(value.flatten() for state in optimizer.state.values() for value in state.values())])
    everyone = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(one, mine) for one in everyone)


def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), NODE_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    stopped_together(rank, fsdp2(rank))
    replicas(rank)
    dist.destroy_process_group()


def test_ranks_equal_one_rank_resume_bitwise_stop_together_and_do_not_drift(no_process_group):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(work, (port,), nprocs=RANKS, start_method="fork")  # no second import of torch

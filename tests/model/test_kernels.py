"""The Triton kernels without a GPU: their numbers in Triton's interpreter, and a compiled block that holds one."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from ettin_foundry.model import kernels
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.transformer import GLU

pytest.importorskip("triton")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    kernels.load()
    monkeypatch.setattr(kernels, "fused", lambda x: kernels._module)


def test_numbers_of_the_kernels():
    """The functions below that are no tests, in a process of its own: Triton chooses its interpreter at import."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-o", "python_functions=*_equals_float64", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "33 passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


def assert_rounded(ours, exact, scale):
    """One rounding to the storage dtype, after fp32 math whose terms are as large as `scale`."""
    kind = torch.finfo(ours.dtype)  # 1 eps: to bf16 the interpreter cuts off, where a GPU rounds to nearest
    allowed = (exact.abs() + kind.tiny) * kind.eps + 8 * torch.finfo(torch.float32).eps * scale
    assert ours.shape == exact.shape and ((ours.double() - exact).abs() <= allowed).all()


@every_dtype
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (17, 65), (9, 192), (3, 1100)])
def gelu_gate_equals_float64(as_on_a_gpu, dtype, rows, width):
    x, grad = ((torch.randn(rows, n) * 10).clamp(-30, 30).to(dtype).requires_grad_() for n in (2 * width, width))
    exact = x.detach().double().requires_grad_()
    a, b = exact.chunk(2, dim=-1)
    (F.gelu(a) * b).backward(grad.double())
    kernels.gelu_gate(x).backward(grad)
    assert_rounded(x.grad, exact.grad, torch.cat((grad * b * (1 + a.abs()), grad * a), dim=-1).abs().detach())


@every_dtype
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 1), (2, 3), (65, 2049), (6, 4099), (1, 50_368)])
def losses_and_gradient_equals_float64(as_on_a_gpu, dtype, rows, vocabulary):
    logits = (torch.randn(rows, vocabulary) * 30).clamp(-80, 76).to(dtype)
    logits[:, -1] = 80  # the largest in the last tile, so that what was summed before is scaled down
    labels = torch.tensor([vocabulary - 1, 0, 2047, 2048, 4095, 4096]).repeat(11)[:rows].clamp(max=vocabulary - 1)
    for weights in (None, torch.rand(rows) * 5):
        exact, factor = logits.double().requires_grad_(), (torch.ones(rows) if weights is None else weights).double()
        expected = F.cross_entropy(exact, labels, reduction="none") * factor
        expected.sum().backward()
        losses, gradient, grad_bias = kernels.losses_and_gradient(place := logits.clone(), labels, weights)
        assert gradient is place and losses.dtype == grad_bias.dtype == torch.float32
        assert_rounded(losses, expected.detach(), 80 * factor)
        assert_rounded(gradient, exact.grad, factor[:, None])
        assert_rounded(grad_bias, exact.grad.sum(0), factor.sum())


def test_a_compiled_block_holds_the_kernel_without_a_break(as_on_a_gpu):
    """Forward and backward, under autocast; nothing is run, for a CPU cannot."""
    def record(graph, inputs):
        graphs.append(str(graph.code))
        outputs = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        return lambda *args: [v if v is None else torch.zeros(v.shape, dtype=v.dtype) for v in outputs]

    graphs, glu = [], GLU(EttinConfig.for_size("nano", causal=True, vocab_size=512))
    glu.compile(backend=aot_autograd(fw_compiler=record), fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out := glu(torch.randn(24, glu.Wi.in_features))).sum().backward()
    assert out.dtype == torch.bfloat16 and ["triton_kernel_wrapper" in code for code in graphs] == [False, True]


def test_without_triton_the_definition_is_used_and_the_reason_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_module", None)
    monkeypatch.setitem(sys.modules, "ettin_foundry.model.triton_kernels", None)  # an import of it fails
    assert [kernels.fused(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)) for _ in range(3)] == [None] * 3
    assert ["ModuleNotFoundError: import of" in record.getMessage() for record in caplog.records] == [True]

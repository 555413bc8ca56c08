"""The kernel in Triton's interpreter. It has to be asked for before Triton is imported: so in a process of its own."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from rqae import RQAE, RqaeConfig
from rqae.encoding.codebook import choose_codes
from rqae.encoding.kernels import TritonGridBlock, is_available
from rqae.literal import encode_literal
from tests.support.random_rqae import identity_rqae, in_float64, random_rqae

# importing Triton here would be too early for the process that imports this file
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.slow,  # the interpreter is
]

FAMILIES = [(5, 4, 23), (7, 3, 18), (4, 4, 9), (9, 2, 9), (2, 4, 9), (2, 8, 3)]  # levels, dimensions, quantizers
ROUNDING = 1e-5  # a margin above it is no matter of rounding


def start(interpret: str) -> None:
    os.environ["TRITON_INTERPRET"] = interpret
    torch.set_num_threads(1)


def in_a_process(interpret: str) -> Iterator[Executor]:
    with ProcessPoolExecutor(1, get_context("spawn"), start, (interpret,)) as pool:
        yield pool


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    yield from in_a_process("1")


@pytest.fixture(scope="module")
def compiler() -> Iterator[Executor]:
    yield from in_a_process("0")


def block_of(model: RQAE, diagonal: torch.Tensor) -> TritonGridBlock:
    return TritonGridBlock(model.config, model.codebook, model.canonical, diagonal)


def kernel_codes(config: RqaeConfig, x: np.ndarray, depth: int) -> np.ndarray:
    """Codes (N, depth) of a random RQAE whose encoder solves its blocks with the kernel."""
    encoder = random_rqae(config).encoder()
    assert isinstance(encoder.block, TritonGridBlock)
    return encoder.encode(torch.from_numpy(x), depth).numpy()


def solved(levels: int, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes and vectors that the block kernel gives the rows of p (N, c), as the second of three quantizers."""
    count, width = p.shape
    model = identity_rqae(levels, width)
    rows, vectors = torch.from_numpy(p.T.copy()), torch.full((3 * width, count), 9.0)
    codes = torch.full((3, count), -1, dtype=torch.int32)
    block_of(model, torch.zeros(3 * width, 3 * width)).solve(rows, codes, vectors, 1, 2)
    assert (codes[[0, 2]] == -1).all() and (vectors[:width] == 9).all() and (vectors[2 * width :] == 9).all()
    return codes[1].numpy(), vectors[width : 2 * width].T.numpy()


@pytest.mark.parametrize("levels,width,quantizers", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_codes_follow_the_definition(interpreter, levels, width, quantizers, tokens):
    config = RqaeConfig(32, width, levels, quantizers)
    model, depth = random_rqae(config), quantizers if tokens > 1 else quantizers - 1
    x = torch.randn(tokens, config.dim, generator=torch.Generator().manual_seed(tokens))
    codes = interpreter.submit(kernel_codes, config, x.numpy(), depth).result()
    exact, margins = in_float64(model, x)
    decided = (np.minimum.accumulate(margins, axis=1) > ROUNDING)[:, :depth]
    assert codes.shape == decided.shape and decided.mean() > 0.8
    np.testing.assert_array_equal(codes[decided], exact[:, :depth][decided])
    np.testing.assert_array_equal(codes[decided], encode_literal(model, x, depth).numpy()[decided])


def awkward(levels: int, width: int) -> torch.Tensor:
    """Rows of p: small integers, half way between two codes, and zero."""
    g = torch.Generator().manual_seed(levels)
    book = identity_rqae(levels, width).codebook[0]
    pairs = book[torch.randint(len(book), (60, 2), generator=g)].sum(dim=1)
    return torch.cat([torch.randint(-3, 4, (60, width), generator=g).float(), pairs, torch.zeros(2, width)])


@pytest.mark.parametrize("levels,width", [(5, 4), (7, 3), (4, 4), (9, 2), (2, 4)])
def test_ties_go_to_the_literal_rule(interpreter, levels, width):
    model, p = identity_rqae(levels, width), awkward(levels, width)
    codes, vectors = interpreter.submit(solved, levels, p.numpy()).result()
    np.testing.assert_array_equal(vectors, model.codebook[0][codes].numpy())
    assert codes[-2:].tolist() == [0, 0]
    expected = choose_codes(p, model.codebook[0], model.canonical).numpy()
    cosines = (torch.nn.functional.normalize(p.double(), dim=1) @ model.codebook[0].double().T).numpy()
    rows = np.flatnonzero(codes != expected)  # only where both are the best to rounding
    assert len(rows) < 0.2 * len(p)
    assert (cosines[rows].max(axis=1) - cosines[rows, codes[rows]] < 3e-7).all()
    assert (cosines[rows].max(axis=1) - cosines[rows, expected[rows]] < 3e-7).all()


@pytest.mark.parametrize("p,code", [((1.0, 0, 0, 0), 8), ((0, 0, 0, 1.0), 1), ((0, -1.0, -0.0, 1.0), 1), ((0,) * 4, 0)])
def test_ties_take_the_lowest_index(interpreter, p, code):
    """With levels -1 and 1 the sign of a zero is free: the lowest index has -1 there."""
    codes, _ = interpreter.submit(solved, 2, np.array([p], dtype=np.float32)).result()
    assert codes.tolist() == [code]


def test_where_the_kernel_serves(monkeypatch):
    config, cpu, gpu = RqaeConfig(8), torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert is_available(config, gpu) and not is_available(config, cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_available(config, cpu) and is_available(RqaeConfig(8, 8, 4), cpu)
    others = [
        RqaeConfig(8, 9, 2),
        RqaeConfig(8, 1, 5),
        RqaeConfig(8, 4, 5, 4, "fsq"),
        RqaeConfig(8, 4, 5, 4, "learned"),
    ]
    for other in others:
        assert not is_available(other, cpu) and not is_available(other, gpu)
    with monkeypatch.context() as patch:
        patch.setattr("triton.__version__", "3.2.0")
        assert not is_available(config, gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not is_available(config, gpu) and not is_available(config, cpu)


def compiled(signature: dict[str, str], sizes: dict[str, int], warps: int, cache: str) -> str:
    """The PTX of the kernel for a Hopper GPU; needs none."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget

    from rqae.encoding import triton_kernels

    kernel = triton_kernels.solve_tile
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, types, sizes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


def test_it_compiles_without_tensor_cores(compiler, tmp_path):
    """What the interpreter runs is not all that the compiler takes; and no product is a TF32 one."""
    block = dict.fromkeys(("p", "vectors", "diagonal", "patterns", "steps", "places", "book"), "*fp32")
    block |= dict.fromkeys(("codes", "canonical"), "*i32") | {"centre": "fp32", "tie": "fp32"}
    block |= dict.fromkeys(("low", "high", "tokens", "pattern_count", "code_count"), "i32")
    block |= dict.fromkeys(("p_stride", "codes_stride", "vectors_stride", "diagonal_stride"), "i32")
    for width in (4, 7):
        ptx = compiler.submit(compiled, block, {"C": width, "TILE": 64}, 2, str(tmp_path)).result()
        assert "fma.rn.f32" in ptx and "tf32" not in ptx and "mma" not in ptx

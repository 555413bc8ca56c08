"""Speed of RQAE encoding and search, compared with the literal algorithms and bare matrix products of the same arithmetic.

Each measurement runs in a separate process, with fresh inputs in every repetition, and prints one JSON line: the median
time in seconds, tokens per second, and the ratio to the other measurements. Weights are random; the time does not depend
on them. The published algorithms run twice: untuned, and with malloc set to keep freed memory, which helps them most. If
there is a GPU, all are measured there too, with larger sizes.
Run: ``python tests/benchmarks/bench_rqae.py [--dim 2304] [--quantizers 1024] [--repeats 5] [--device cpu]``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rqae import RQAE, RqaeConfig
from rqae.features import layer_weights
from rqae.literal import encode_literal
from rqae.searching.scan import search

DEPTHS, TOP_K = (16, 64, 256), 100
UNTUNED = " untuned"  # a baseline with the allocator's defaults, as when the published code is run
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "4000000000")
GATHERED = 2  # features that the gathering search is timed on; its time is proportional to their number


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens to encode, of tokens and features to search, and batch sizes of the literal algorithm."""

    tokens: int
    corpus: int
    features: int
    literal: tuple[int, ...]


SIZES = {
    "cpu": Sizes(4096, 131_072, 256, (512, 4096)),
    "cuda": Sizes(262_144, 4_700_000, 1000, (4096, 16_384, 65_536, 262_144)),
}


def model_of(dim: int, quantizers: int) -> RQAE:
    g = torch.Generator().manual_seed(0)
    return RQAE(
        RqaeConfig(dim, num_quantizers=quantizers),
        torch.randn(quantizers, 4, dim, generator=g) / dim**0.5,
        torch.randn(quantizers, 4, generator=g) * 0.1,
        torch.randn(quantizers, dim, 4, generator=g) / dim**0.5 * torch.linspace(1, 0.1, quantizers)[:, None, None],
        torch.randn(quantizers, dim, generator=g) * 0.01,
    )


def rows_of(count: int, dim: int, seed: int, device: str) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator(device).manual_seed(seed), device=device)


def corpus_of(model: RQAE, tokens: int, seed: int) -> np.ndarray:
    """Random codes, which take as long to search as those of a corpus."""
    usable = model.canonical[model.codebook[0].norm(dim=1) > 0].unique().cpu().numpy().astype(np.uint16)
    return usable[np.random.default_rng(seed).integers(len(usable), size=(tokens, max(DEPTHS)), dtype=np.uint16)]


def gathering_search(model: RQAE, codes: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
    """The published search: per feature, look up the cosine of every code, weight it, sum over depths, sort."""
    weights, best = layer_weights(model), []
    for feature in features:
        layers = torch.arange(len(feature), device=codes.device)
        cosines = torch.einsum("ikc,ic->ik", model.codebook[: len(feature)], model.codebook[layers, feature])
        found = cosines[layers, codes]  # (N, k)
        sums = (found * weights[: len(feature)]).cumsum(dim=1) / weights[: len(feature)].cumsum(dim=0)
        best += [sums[:, depth - 1].topk(TOP_K).indices for depth in DEPTHS]
    return best


def timed(repeats: int, prepare: Callable[[int], Any], work: Callable[[Any], object]) -> list[float]:
    """Seconds of each repetition, after a warm-up that is not counted."""
    seconds = []
    for repeat in range(repeats + 1):
        given = prepare(repeat)
        _finish()
        start = time.perf_counter()
        work(given)
        _finish()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(what: str, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement: ``tokens``, ``seconds`` and further results."""
    dim, quantizers, repeats, device = options.dim, options.quantizers, options.repeats, options.device
    sizes, width = SIZES[device], 4 * options.quantizers
    kind, _, size = what.removesuffix(UNTUNED).partition(" ")
    if kind == "gemm":
        left, right = torch.randn(dim, width, device=device), torch.randn(width, width // 2, device=device)

        def products(x: tuple[torch.Tensor, torch.Tensor]) -> None:
            torch.mm(x[0], left)
            torch.mm(x[1], right)

        def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            return rows_of(sizes.tokens, dim, seed, device), rows_of(sizes.tokens, width, seed, device)

        return {"tokens": sizes.tokens, "seconds": timed(repeats, inputs, products)}
    if kind == "search-gemm":
        deep = 4 * max(DEPTHS)
        u = torch.randn(sizes.features, deep, device=device)
        tokens = min(sizes.corpus, 131_072)
        seconds = timed(repeats, lambda seed: rows_of(tokens, deep, seed, device), lambda x: torch.mm(u, x.T))
        return {"tokens": sizes.corpus, "seconds": [each * sizes.corpus / tokens for each in seconds]}
    model = model_of(dim, quantizers).to(device)
    if kind == "literal":
        rows = int(size)
        seconds = timed(repeats, lambda seed: rows_of(rows, dim, seed, device), lambda x: encode_literal(model, x))
        return {"tokens": rows, "seconds": seconds}
    if kind == "encode":
        repeats *= 5 if int(size) < quantizers else 1  # times of milliseconds vary more

        def encode(x: torch.Tensor) -> torch.Tensor:
            return model.encode(x, int(size), torch.uint16)

        return {
            "tokens": sizes.tokens,
            "seconds": timed(repeats, lambda seed: rows_of(sizes.tokens, dim, seed, device), encode),
        }
    if kind == "codes":
        x = rows_of(512, dim, 99, device)
        ours, theirs = model.encode(x), encode_literal(model, x)
        same = (ours == theirs).float()
        errors = [float((model.decode(codes) - x).square().mean()) for codes in (ours, theirs)]
        shares = {"codes_equal": float(same.mean()), "codes_equal_first_64": float(same[:, :64].mean())}
        return {"tokens": 512, **shares, "error_ratio": errors[0] / errors[1]}
    features = torch.from_numpy(corpus_of(model, sizes.features, 7).astype(np.int64)).to(device)
    if kind == "gather":
        tokens = min(sizes.corpus, 131_072)
        scale = sizes.features / GATHERED * sizes.corpus / tokens

        def given(seed: int) -> torch.Tensor:
            return torch.from_numpy(corpus_of(model, tokens, seed).astype(np.int64)).to(device)

        seconds = timed(repeats, given, lambda codes: gathering_search(model, codes, features[:GATHERED]))
        timed_on = f"{GATHERED} features, {tokens} tokens"
        return {"tokens": sizes.corpus, "seconds": [each * scale for each in seconds], "timed_on": timed_on}
    codes = corpus_of(model, sizes.corpus, 0)
    search(model, codes[:4096], features, DEPTHS, top_k=TOP_K)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rolled = [codes, *(np.roll(codes, seed, axis=0) for seed in range(1, 2))]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed(
        repeats, lambda seed: rolled[seed % 2], lambda codes: search(model, codes, features, DEPTHS, top_k=TOP_K)
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - max(before, held)
    return {"tokens": sizes.corpus, "features": sizes.features, "seconds": seconds, "memory_mb": round(grown / 1024)}


def in_its_own_process(what: str, options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ("dim", "quantizers", "repeats", "device")}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    command = [sys.executable, __file__, "--measure", what, *arguments]
    # without this, the published algorithms spend much time on new memory pages for each intermediate result
    kept = {} if what.endswith(UNTUNED) else KEEP_MEMORY
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**kept, **os.environ})
    return dict(json.loads(done.stdout))


def compare(options: argparse.Namespace) -> None:
    """All measurements on one device, each with its ratio to earlier ones."""
    sizes, full = SIZES[options.device], f"encode {options.quantizers}"
    literal = [f"literal {rows}" for rows in sizes.literal]
    untuned = [f"literal {sizes.literal[0]}{UNTUNED}", f"gather{UNTUNED}"] if options.device == "cpu" else []
    speed: dict[str, float] = {}
    for what in ["gemm", *literal, *untuned, full, "encode 64", "codes", "search-gemm", "gather", "search"]:
        found = in_its_own_process(what, options)
        line: dict[str, Any] = {"what": what, "device": options.device, "tokens": found.pop("tokens")}
        if "seconds" in found:
            line["seconds"] = round(statistics.median(found.pop("seconds")), 4)
            speed[what] = line["tokens"] / line["seconds"]
            line["tokens_per_s"] = round(speed[what])
        ratios: dict[str, str] = {}
        if what == full:
            ratios = {"of_gemm": "gemm", "times_literal_best": max(literal, key=speed.__getitem__)}
            ratios |= {f"times_{one.replace(' ', '_')}": one for one in [*literal, *untuned[:1]]}
        elif what == "encode 64":
            ratios = {"times_full_depth": full}
        elif what == "search":
            ratios = {"of_gemm": "search-gemm", "times_gather": "gather"}
            ratios |= {f"times_{one.replace(' ', '_')}": one for one in untuned[1:]}
        line |= {name: round(speed[what] / speed[other], 3) for name, other in ratios.items()}
        print(json.dumps({**line, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--quantizers", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=tuple(SIZES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    for device in [options.device] if options.device else list(SIZES):
        if device == "cuda" and not torch.cuda.is_available():
            print(json.dumps({"what": "all of the above", "device": "cuda", "seconds": "not measured: no GPU here"}))
            continue
        compare(argparse.Namespace(**{**vars(options), "device": device}))


if __name__ == "__main__":
    main()

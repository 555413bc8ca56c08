"""Speed of RQAE encoding and search, against the literal algorithms and bare matrix products of the same arithmetic.

Each measurement runs in a process of its own, with fresh inputs at every repetition, and prints one JSON line: the median
of its seconds, tokens per second, and its ratio to the others. Weights are random; time does not depend on them.
Run: ``python tests/benchmarks/bench_rqae.py [--dim 2304] [--quantizers 1024] [--repeats 5]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rqae import RQAE, RqaeConfig
from rqae.features import layer_weights
from rqae.literal import encode_literal
from rqae.searching import search

TOKENS, CORPUS, FEATURES, DEPTHS, TOP_K = 4096, 131_072, 256, (16, 64, 256), 100
GATHERED = 2  # features that the gathering search is timed on; its time is proportional to them


def model_of(dim: int, quantizers: int) -> RQAE:
    g = torch.Generator().manual_seed(0)
    return RQAE(
        RqaeConfig(dim, num_quantizers=quantizers),
        torch.randn(quantizers, 4, dim, generator=g) / dim**0.5,
        torch.randn(quantizers, 4, generator=g) * 0.1,
        torch.randn(quantizers, dim, 4, generator=g) / dim**0.5 * torch.linspace(1, 0.1, quantizers)[:, None, None],
        torch.randn(quantizers, dim, generator=g) * 0.01,
    )


def rows_of(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def corpus_of(model: RQAE, tokens: int, seed: int) -> np.ndarray:
    """Random distinct codes: a corpus as far as time goes."""
    usable = model.canonical[model.codebook[0].norm(dim=1) > 0].unique().numpy()
    drawn = np.random.default_rng(seed).integers(len(usable), size=(tokens, max(DEPTHS)))
    return usable[drawn].astype(np.uint16)


def gathering_search(model: RQAE, codes: np.ndarray, features: torch.Tensor) -> list[torch.Tensor]:
    """As published: per feature, look up the cosine of every code, weigh, sum over depths, sort."""
    weights, tokens = layer_weights(model), torch.from_numpy(codes.astype(np.int64))
    best = []
    for feature in features:
        layers = torch.arange(len(feature))
        cosines = torch.einsum("ikc,ic->ik", model.codebook[: len(feature)], model.codebook[layers, feature])
        found = cosines[layers, tokens]  # (N, k)
        sums = (found * weights[: len(feature)]).cumsum(dim=1) / weights[: len(feature)].cumsum(dim=0)
        best += [sums[:, depth - 1].topk(TOP_K).indices for depth in DEPTHS]
    return best


def timed(repeats: int, prepare: Callable[[int], Any], work: Callable[[Any], object]) -> list[float]:
    """Seconds of each repetition, after one that is not counted."""
    seconds = []
    for repeat in range(repeats + 1):
        given = prepare(repeat)
        start = time.perf_counter()
        work(given)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure(what: str, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement: ``tokens``, ``seconds`` and whatever else it found."""
    dim, quantizers, repeats = options.dim, options.quantizers, options.repeats
    width = 4 * quantizers
    kind, _, size = what.partition(" ")
    if kind == "gemm":
        left, right = torch.randn(dim, width), torch.randn(width, width // 2)

        def products(x: tuple[torch.Tensor, torch.Tensor]) -> None:
            torch.mm(x[0], left)
            torch.mm(x[1], right)

        return {
            "tokens": TOKENS,
            "seconds": timed(
                repeats, lambda seed: (rows_of(TOKENS, dim, seed), rows_of(TOKENS, width, seed)), products
            ),
        }
    if kind == "gather-gemm":
        u = torch.randn(FEATURES, 4 * max(DEPTHS))
        return {
            "tokens": CORPUS,
            "seconds": timed(repeats, lambda seed: rows_of(CORPUS, 4 * max(DEPTHS), seed), lambda x: torch.mm(u, x.T)),
        }
    model = model_of(dim, quantizers)
    if kind == "literal":
        rows = int(size)
        seconds = timed(repeats, lambda seed: rows_of(rows, dim, seed), lambda x: encode_literal(model, x))
        return {"tokens": rows, "seconds": seconds}
    if kind == "encode":
        depth = int(size)
        seconds = timed(
            repeats, lambda seed: rows_of(TOKENS, dim, seed), lambda x: model.encode(x, depth, torch.uint16)
        )
        return {"tokens": TOKENS, "seconds": seconds}
    if kind == "codes":
        x = rows_of(512, dim, 99)
        ours, theirs = model.encode(x), encode_literal(model, x)
        same = ours == theirs
        errors = [float((model.decode(codes) - x).square().mean()) for codes in (ours, theirs)]
        return {
            "tokens": 512,
            "codes_equal": float(same.float().mean()),
            "codes_equal_first_64": float(same[:, :64].float().mean()),
            "error_ratio": errors[0] / errors[1],
        }
    features = torch.from_numpy(corpus_of(model, FEATURES, 7).astype(np.int64))
    if kind == "gather":
        seconds = timed(
            repeats,
            lambda seed: corpus_of(model, CORPUS, seed),
            lambda codes: gathering_search(model, codes, features[:GATHERED]),
        )
        return {"tokens": CORPUS, "seconds": [each * FEATURES / GATHERED for each in seconds], "timed_on": GATHERED}
    codes = corpus_of(model, CORPUS, 0)
    search(model, codes[:4096], features, DEPTHS, top_k=TOP_K)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed(
        repeats,
        lambda seed: np.roll(codes, seed, axis=0),
        lambda codes: search(model, codes, features, DEPTHS, top_k=TOP_K),
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tokens": CORPUS, "seconds": seconds, "memory_mb": round(grown / 1024)}


def in_its_own_process(what: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--dim", options.dim, "--quantizers", options.quantizers, "--repeats", options.repeats]
    command = [sys.executable, __file__, "--measure", what, *map(str, sizes)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--quantizers", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    full, size = f"encode {options.quantizers}", {"dim": options.dim, "quantizers": options.quantizers}
    wanted = ["gemm", "literal 512", f"literal {TOKENS}", full, "encode 64", "codes", "gather-gemm", "gather", "search"]
    speed: dict[str, float] = {}
    for what in wanted:
        found = in_its_own_process(what, options)
        line: dict[str, Any] = {"benchmark": "rqae", "what": what, **size, "tokens": found["tokens"]}
        if "seconds" in found:
            line["seconds"] = round(statistics.median(found.pop("seconds")), 4)
            speed[what] = found["tokens"] / line["seconds"]
            line["tokens_per_s"] = round(speed[what])
        for name, other in (
            ("of_gemm", "gemm"),
            ("times_literal", f"literal {TOKENS}"),
            ("times_literal_512", "literal 512"),
        ):
            if what == full:
                line[name] = round(speed[what] / speed[other], 3)
        if what == "encode 64":
            line["times_full_depth"] = round(speed[what] / speed[full], 2)
        if what == "search":
            line |= {
                "of_gemm": round(speed[what] / speed["gather-gemm"], 3),
                "times_gather": round(speed[what] / speed["gather"], 1),
            }
        print(json.dumps({**line, **found}), flush=True)


if __name__ == "__main__":
    main()

"""Speed of RQAE encoding: the blocked code-space form against the literal definition, and of intensity against gathering.

Prints one JSON line per measurement, the median of several runs: tokens per second of wall time and of CPU time (all
threads; the one to trust on a busy machine). Weights are random; time does not depend on them. Run:
``python tests/benchmarks/bench_rqae_encode.py [--dim 576] [--quantizers 256] [--tokens 1024] [--threads 2]``.

Last figures, one thread of a 2-core machine that was busy with other work (load 6): encoding 16,300 tokens/s at depth 256,
71,000 at 64, 243,000 at 16, 4.6 times the literal 3,250; all codes equal; intensity 85,000 tokens/s for 64 features at
three depths, 91 times gathering. Two threads on a busy machine are slower than one: OpenMP spins at its barriers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rqae import RQAE, RqaeConfig, intensity
from rqae.features import intensity_literal
from rqae.literal import encode_literal


def model_of(dim: int, quantizers: int) -> RQAE:
    g = torch.Generator().manual_seed(0)
    return RQAE(
        RqaeConfig(dim, num_quantizers=quantizers),
        torch.randn(quantizers, 4, dim, generator=g) / dim**0.5,
        torch.randn(quantizers, 4, generator=g) * 0.1,
        torch.randn(quantizers, dim, 4, generator=g) / dim**0.5 * torch.linspace(1, 0.1, quantizers)[:, None, None],
        torch.randn(quantizers, dim, generator=g) * 0.01,
    )


def seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median wall and CPU time."""
    call()
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return statistics.median(wall), statistics.median(cpu)


def report(what: str, tokens: int, elapsed: tuple[float, float], **further: object) -> None:
    wall, cpu = (round(tokens / each) for each in elapsed)
    print(json.dumps({"what": what, "tokens_per_s": wall, "tokens_per_cpu_s": cpu, **further}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--quantizers", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokens = model_of(options.dim, options.quantizers), options.tokens
    x = torch.randn(tokens, options.dim, generator=torch.Generator().manual_seed(1))
    sizes = {"dim": options.dim, "quantizers": options.quantizers, "rows": tokens, "threads": options.threads}
    literal = seconds(lambda: encode_literal(model, x), 5)
    report("encode, literal", tokens, literal, **sizes)
    for depth in sorted({16, 64, options.quantizers}):
        blocked = seconds(lambda depth=depth: model.encode(x, depth), 15)
        ratio = {"times_literal": round(literal[1] / blocked[1], 1)} if depth == options.quantizers else {}
        report(f"encode, blocked, depth {depth}", tokens, blocked, **ratio)
    equal = float((model.encode(x) == encode_literal(model, x)).float().mean())
    print(json.dumps({"what": "codes equal", "share": round(equal, 6)}))
    codes, features = model.encode(x), model.encode(x[:64])
    gather = seconds(lambda: intensity_literal(model, codes, features, options.quantizers), 1)
    report("intensity of 64 features, gather", tokens, gather)
    depths = [depth for depth in (16, 64, 256) if depth <= options.quantizers]
    product = seconds(lambda: intensity(model, codes, features, depths), 15)
    report("intensity of 64 features, three depths", tokens, product, times_gather=round(gather[1] / product[1], 1))


if __name__ == "__main__":
    main()

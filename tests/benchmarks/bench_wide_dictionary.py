"""Measures a dictionary of a million latents (2,304 × 1,048,576) on a laptop: a few features without the other columns.

Writes a JumpReLU SAE in Gemma Scope 2's layout as a sparse file (19 GB to read, a few MB on disk) to a temporary folder and
removes it at the end. All columns are holes, that is zeros; one in four of the drawn latents fires because of its bias.
Each measurement runs in a separate process and prints one JSON line: seconds, growth of the peak memory, bytes read. Holes
are read as pages of zeros, so ``seconds`` does not include disk access. The full encode is timed on fewer latents and
scaled, because its time is proportional to their number.
Run: ``python tests/benchmarks/bench_wide_dictionary.py [--dim 2304] [--width 1048576] [--tokens 4096] [--features 100]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evalkit.sources import load_source
from evalkit.sources.sae.source import SaeSource

ALIVE_SHARE = 4  # one in this many of the drawn latents is alive
TIMED_LATENTS = 8192  # latents that the full encode is timed on
BATCH = 1024  # tokens encoded at a time


def write(folder: Path, dim: int, width: int, features: int) -> None:
    """Write the sparse file, in which only the vectors have data."""
    shapes = {"w_enc": (dim, width), "b_enc": (width,), "w_dec": (width, dim), "b_dec": (dim,), "threshold": (width,)}
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    folder.mkdir(parents=True)
    drawn = candidates(width, features)
    thresholds, biases = np.full(width, 1e9, np.float32), np.ones(width, np.float32)
    thresholds[drawn[::ALIVE_SHARE]] = 0.5
    with (folder / "params.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(packed)) + packed)
        base = stream.tell()
        stream.truncate(base + at)
        for name, values in (("threshold", thresholds), ("b_enc", biases)):
            stream.seek(base + header[name]["data_offsets"][0])
            stream.write(values.tobytes())
    config = {"model_name": "google/gemma-3-1b-pt", "hf_hook_point_in": "model.layers.12.output", "width": width}
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "jump_relu", "l0": 50}))


def candidates(width: int, features: int) -> np.ndarray:
    """The latents to measure, drawn at random like the features of a run."""
    return np.random.default_rng(1).choice(width, size=ALIVE_SHARE * features, replace=False)


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement, with the growth of the peak memory above that of torch and evalkit themselves."""
    x = torch.randn(1, options.tokens, options.dim, generator=torch.Generator().manual_seed(2))
    before = memory_mb()
    start, read = time.perf_counter(), bytes_read()
    if what == "product":  # the arithmetic only, with the columns in memory
        left = torch.randn(options.dim, options.features)
        start = time.perf_counter()
        x @ left
        return {"seconds": time.perf_counter() - start, "memory_mb": memory_mb() - before}
    source = load_source(folder)
    assert isinstance(source, SaeSource)
    if what == "open":
        pass
    elif what == "full encode":
        part = source.weights.gather(slice(0, TIMED_LATENTS), x.device)
        for low in range(0, options.tokens, BATCH):
            part.activations(x[0, low : low + BATCH])
    else:
        drawn = [str(latent) for latent in candidates(options.width, options.features)]
        chosen = alive(source, x, drawn)[: options.features]
        assert len(chosen) == options.features
        if what == "activations":
            start, read = time.perf_counter(), bytes_read()
            for low in range(0, options.tokens, BATCH):
                source.activations(x[:, low : low + BATCH], chosen)
    return {
        "seconds": time.perf_counter() - start,
        "memory_mb": memory_mb() - before,
        "bytes_read": bytes_read() - read,
    }


def alive(source: SaeSource, x: torch.Tensor, drawn: list[str]) -> list[str]:
    """The drawn latents that are active on any token."""
    fired = torch.zeros(len(drawn), dtype=torch.bool)
    for low in range(0, x.shape[1], BATCH):
        fired |= (source.activations(x[:, low : low + BATCH], drawn)[0] > 0).any(dim=0)
    return [feature for feature, active in zip(drawn, fired.tolist(), strict=True) if active]


def bytes_read() -> int:
    """Bytes that this process has read from files, cached or not; 0 if the system does not report them."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else 0


def in_its_own_process(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    arguments = [
        str(part) for name in ("dim", "width", "tokens", "features") for part in (f"--{name}", vars(options)[name])
    ]
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder), *arguments]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def compare(folder: Path, options: argparse.Namespace) -> None:
    """All measurements; shares are relative to the time of encoding every latent."""
    size = (folder / "params.safetensors").stat().st_size
    seconds = {}
    for what in ("full encode", "open", "choose alive", "activations", "product"):
        found = in_its_own_process(what, folder, options)
        line: dict[str, Any] = {"what": what, "dim": options.dim, "width": options.width, "tokens": options.tokens}
        seconds[what] = found["seconds"]
        if what == "full encode":
            seconds[what] *= options.width / TIMED_LATENTS
            line["timed_on"] = f"{TIMED_LATENTS} latents"
            line["file_gb"] = round(size / 1e9, 2)
            found.pop("bytes_read")
        else:
            looked_at = options.features * (ALIVE_SHARE if what == "choose alive" else 1)
            line["features"] = 0 if what == "open" else looked_at
            line["arithmetic_share"] = round(line["features"] / options.width, 6)
            line["seconds_share"] = round(seconds[what] / seconds["full encode"], 6)
        line["seconds"] = round(seconds[what], 4)
        line["memory_mb"] = round(found["memory_mb"])
        if "bytes_read" in found:
            line["bytes_read"] = found["bytes_read"]
            line["file_share"] = round(found["bytes_read"] / size, 6)
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2304)
    parser.add_argument("--width", type=int, default=1_048_576)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options)))
        return
    above = Path(tempfile.mkdtemp(prefix="wide-dictionary-"))
    try:
        folder = above / "resid_post" / f"layer_12_width_{options.width // 1024}k_l0_medium"
        write(folder, options.dim, options.width, options.features)
        disk = 512 * (folder / "params.safetensors").stat().st_blocks
        print(json.dumps({"what": "the file's own blocks on disk", "disk_mb": round(disk / 1e6)}), flush=True)
        compare(folder, options)
    finally:
        shutil.rmtree(above)


if __name__ == "__main__":
    main()

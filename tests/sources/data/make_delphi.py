"""Makes tests/sources/data/delphi with eai-delphi itself: latent caches of two hook points of a random model.

    pip install --no-deps --target FOLDER eai-delphi==0.1.3 …    (see tests/support/delphi_library.py for what it needs)
    PYTHONPATH=FOLDER:. python tests/sources/data/make_delphi.py [folder]

``latents/`` is what the library's own cache writes (splits, tokens, config); ``tokenizer/`` the tokenizer. ``expected.npz``
holds, beside it, the dense activations (sequence, position, latent) of each hook point as the model's hooks give them, and
the frequency of every latent and its windows as the library's own loader makes them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

from tests.conftest import byte_level_tokenizer
from tests.support.delphi_library import without_engine

SEQUENCES, LENGTH, WIDTH, TOP_K, WINDOW = 72, 48, 48, 2, 16
N_SPLITS = {"layers.0": 3, "layers.1.mlp": 1}
WORDS = ["whale", "ship", "sea", "calm", "deck", "number", "token", "saw", "1851", "quotes", "naïve", "café", "under"]


def tokens_of(tokenizer: Any) -> torch.Tensor:
    """(sequence, position): short documents of words in random order, with BOS before each, cut anywhere."""
    random = np.random.default_rng(5)
    ids: list[int] = []
    while len(ids) < SEQUENCES * LENGTH:
        ids += [tokenizer.bos_token_id, *tokenizer(" ".join(random.choice(WORDS, 30)) + ".")["input_ids"]]
    return torch.tensor(ids[: SEQUENCES * LENGTH]).reshape(SEQUENCES, LENGTH)


def encoder(seed: int) -> Any:
    """A random top-k dictionary."""
    weights = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(seed))

    def encode(hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.relu((hidden - hidden.mean(dim=-1, keepdim=True)) @ weights)
        kept = scores.topk(TOP_K, dim=-1)
        return torch.zeros_like(scores).scatter_(-1, kept.indices, kept.values)

    return encode


def main(root: Path) -> None:
    without_engine()
    from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
    from delphi.latents import LatentCache, LatentDataset

    torch.manual_seed(3)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaModel(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, **heads)).eval()
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    tokens = tokens_of(tokenizer)
    expected: dict[str, Any] = {"tokens": tokens.numpy()}
    for seed, (hook, n_splits) in enumerate(N_SPLITS.items()):
        encode, seen = encoder(seed), []
        cache = LatentCache(model, {hook: encode}, batch_size=24)
        module = model.get_submodule(hook)
        handle = module.register_forward_hook(
            lambda _module, _input, output, seen=seen, encode=encode: seen.append(
                encode(output[0] if isinstance(output, tuple) else output)
            )
        )
        cache.run(tokens.numel(), tokens)
        handle.remove()
        cache.save_splits(n_splits, root / "latents")
        config = CacheConfig(cache_ctx_len=LENGTH, batch_size=24, n_tokens=tokens.numel(), n_splits=n_splits)
        cache.save_config(root / "latents", config, "example/tiny-llama")
        expected[hook] = torch.cat(seen).half().numpy()
        records = LatentDataset(
            root / "latents",
            SamplerConfig(n_examples_train=4, n_examples_test=0, n_quantiles=2),
            ConstructorConfig(example_ctx_len=WINDOW, min_examples=1, n_non_activating=4),
            tokenizer=tokenizer,
            modules=[hook],
        )
        frequency = np.zeros(WIDTH)
        peaks = np.zeros(WIDTH)
        for record in records:
            frequency[record.latent.latent_index] = record.per_token_frequency
            peaks[record.latent.latent_index] = record.max_activation
        expected[f"{hook}.frequency"], expected[f"{hook}.peak"] = frequency, peaks
    np.savez_compressed(root / "expected.npz", **expected)
    from importlib.metadata import version

    made_by = {"eai-delphi": version("eai-delphi"), "torch": torch.__version__, "python": sys.version.split()[0]}
    (root / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "delphi")

"""Next-token losses and replaced hidden states against transformers itself with a plain torch hook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evalkit.errors import BadConfig, BadShape
from evalkit.subject.language_model import LanguageModel
from evalkit.subject.model import Subject

IDS = np.random.default_rng(7).integers(2, 300, size=(3, 40))


@pytest.fixture(params=["tiny_llama", "tiny_gemma", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def module_of(model: torch.nn.Module, path: str) -> torch.nn.Module:
    base = model.get_decoder()  # type: ignore[operator]
    blocks = base.layers if hasattr(base, "layers") else base.h
    index, *rest = path.removeprefix("layers.").split(".")
    names = {"self_attn": "self_attn" if hasattr(blocks[0], "self_attn") else "attn", "mlp": "mlp"}
    return getattr(blocks[int(index)], names[rest[0]]) if rest else blocks[int(index)]


def reference(
    folder: Path, site: str | None = None, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Losses by hand: log of the softmax at the next token, with a hook of our own at the site."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if site is not None and change is not None:

        def hook(module: torch.nn.Module, inputs: object, output: object) -> object:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)  # type: ignore[arg-type]

        module_of(model, site).register_forward_hook(hook)
    with torch.no_grad():
        chances = model(torch.from_numpy(IDS), use_cache=False).logits.softmax(-1)
    losses = torch.zeros(len(IDS), IDS.shape[1] - 1)
    for row in range(IDS.shape[0]):
        for position in range(IDS.shape[1] - 1):
            losses[row, position] = -chances[row, position, IDS[row, position + 1]].log()
    return losses


def test_losses_are_those_of_transformers(folder: Path) -> None:
    language = LanguageModel.load(folder, sites=["layers.1"], dtype="float32")
    losses = language.losses(IDS)
    assert losses.shape == (3, 39) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["layers.1", "layers.2.mlp", "layers.2.self_attn"])
def test_a_replacement_is_what_the_forward_goes_on_with(folder: Path, site: str) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(40) % 3 == 0

    def change(hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(keep[:, None], hidden, 0.3 * hidden + direction)

    language = LanguageModel.load(folder, sites=[site], dtype="float32")
    found = language.losses(IDS, site=site, replace=change)
    torch.testing.assert_close(found, reference(folder, site, change), rtol=1e-4, atol=1e-5)
    assert (found - language.losses(IDS)).abs().max() > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_identity_costs_nothing_at_all(folder: Path, dtype: str) -> None:
    language = LanguageModel.load(folder, sites=["layers.2"], dtype=dtype)  # type: ignore[arg-type]
    assert torch.equal(language.losses(IDS, site="layers.2", replace=lambda hidden: hidden), language.losses(IDS))


def test_what_is_replaced_is_what_the_subject_reads(tiny_llama: Path) -> None:
    """Also after the replacement: it is gone again, and hidden states are those of a model loaded for them alone."""
    language = LanguageModel.load(tiny_llama, sites=["layers.3"], dtype="float32")
    seen: list[torch.Tensor] = []
    language.losses(IDS, site="layers.3", replace=lambda hidden: seen.append(hidden.clone()) or hidden)
    hidden = language.subject.hidden(IDS)["layers.3"]
    torch.testing.assert_close(seen[0], hidden, rtol=1e-5, atol=1e-5)
    alone = Subject.load(tiny_llama, sites=["layers.3"], dtype="float32")
    assert torch.equal(hidden, alone.hidden(IDS)["layers.3"])
    assert len(language.subject._blocks) == 12 and len(alone._blocks) == 5
    assert language.subject.info.sites == alone.info.sites and language.subject.info.model == alone.info.model


def test_the_subject_itself_can_be_read_downstream_of_a_replacement(tiny_llama: Path) -> None:
    subject = Subject.load(tiny_llama, sites=["layers.3", "layers.6"], dtype="float32")
    before = subject.hidden(IDS)
    with subject.replaced("layers.3", lambda hidden: hidden + 1):
        during = subject.hidden(IDS)
    torch.testing.assert_close(during["layers.3"], before["layers.3"] + 1)
    assert not torch.allclose(during["layers.6"], before["layers.6"], atol=1e-2)
    after = subject.hidden(IDS)
    assert all(torch.equal(after[site], before[site]) for site in before)


def test_the_replacement_ends_with_an_error_too(tiny_llama: Path) -> None:
    language = LanguageModel.load(tiny_llama, sites=["layers.3"], dtype="float32")
    clean = language.losses(IDS)
    with pytest.raises(BadShape) as caught:
        language.losses(IDS, site="layers.3", replace=lambda hidden: hidden[:, :-1])
    assert str(caught.value) == (
        "replacement at layers.3: expected shape (3, 40, 32); seen shape (3, 39, 32); "
        "fix: return one state per given state"
    )
    with pytest.raises(BadConfig, match=r"site 'layers.99'"):
        language.losses(IDS, site="layers.99", replace=lambda hidden: hidden)
    assert torch.equal(language.losses(IDS), clean)


def test_wrong_names_are_said_as_the_subject_says_them(tiny_llama: Path) -> None:
    with pytest.raises(
        BadConfig, match=r"site 'layers.12': expected a module path of tiny-llama, layers.0 to layers.11"
    ):
        LanguageModel.load(tiny_llama, sites=["layers.12"])
    with pytest.raises(BadConfig, match="dtype 'int8': expected bfloat16 or float32"):
        LanguageModel.load(tiny_llama, sites=["layers.1"], dtype="int8")  # type: ignore[arg-type]


def test_logits_of_one_forward_are_bounded(tiny_llama: Path) -> None:
    language = LanguageModel.load(tiny_llama, sites=["layers.1"])
    assert language.contexts_per_forward(128) == (1 << 25) // (128 * 300)
    assert language.contexts_per_forward(10**9) == 1

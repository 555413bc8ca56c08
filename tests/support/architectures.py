"""Tiny random models of many architectures of transformers, in memory, for what must read each of them rightly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from evalkit.subject.loading import decoder_of
from evalkit.subject.model import Subject

VOCAB, WIDTH, BLOCKS = 300, 32, 4
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_OPT = {
    **{name: _SIZE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "ffn_dim": 64,
    "max_position_embeddings": 256,
}
_BART = {"vocab_size": VOCAB, "d_model": WIDTH, "max_position_embeddings": 256, "is_decoder": True}
_BART |= {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", BLOCKS),)}
_BART |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}

# Name of the case: class of the config before "Config", and its arguments.
SEQUENTIAL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 8}),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma": ("Gemma", _GROUPED),
    "gemma2": ("Gemma2", {**_GROUPED, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {**_GROUPED, "sliding_window": 8}),
    "olmo2": ("Olmo2", {**_SIZE, "num_key_value_heads": 4}),
    "exaone4": ("Exaone4", {**_GROUPED, "sliding_window": 8}),
    "glm4": ("Glm4", _GROUPED),
    "granite": (
        "Granite",
        {**_SIZE, "num_key_value_heads": 2, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    ),
    "granite moe": ("GraniteMoe", {**_SIZE, "num_key_value_heads": 2, "residual_multiplier": 0.4, **_EXPERTS}),
    "mixtral": ("Mixtral", {**_GROUPED, **_EXPERTS}),
    "phi3": ("Phi3", {**_SIZE, "num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2", {**_SIZE, "num_key_value_heads": 2}),
    "gpt2": ("GPT2", _GPT),
    "gpt_neo": (
        "GPTNeo",
        {
            **{name: _SIZE[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings")},
            **{"num_layers": BLOCKS, "num_heads": 4, "attention_types": [[["global", "local"], BLOCKS // 2]]},
        },
    ),
    "gpt_neox in sequence": ("GPTNeoX", {**_SIZE, "use_parallel_residual": False}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4}),
    "mpt": ("Mpt", {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": BLOCKS, "n_heads": 4, "expansion_ratio": 2}),
    "falcon in sequence": (
        "Falcon",
        {**_SIZE, "parallel_attn": False, "new_decoder_architecture": False, "alibi": True, "multi_query": False},
    ),
    "opt": ("OPT", {**_OPT, "word_embed_proj_dim": WIDTH}),
    "biogpt": ("BioGpt", _SIZE),
    "stablelm": ("StableLm", {**_SIZE, "num_key_value_heads": 2}),
    "modernbert decoder": ("ModernBertDecoder", _SIZE),  # its output head is called decoder
    "ctrl": ("CTRL", {**_GPT, "dff": 64}),
}
PARALLEL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoX", _SIZE),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**_GPT, "rotary_dim": 4}),
    "phi": ("Phi", _SIZE),
    "cohere": ("Cohere", {**_SIZE, "num_key_value_heads": 2}),
    "falcon": ("Falcon", {**_SIZE, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon with two norms": ("Falcon", {**_SIZE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm in parallel": ("StableLm", {**_SIZE, "num_key_value_heads": 2, "use_parallel_residual": True}),
}
# Blocks that are no sum of their input and two contributions.
OTHER: Mapping[str, tuple[str, dict[str, Any]]] = {
    "opt-350m": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt": ("OpenAIGPT", _GPT),
    "bloom over normed states": (
        "Bloom",
        {
            **{"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4},
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "mamba": ("Mamba", {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "state_size": 4}),
    "bart": ("Bart", _BART),
    "doge": ("Doge", _GROUPED),  # multiplies the stream itself, by weights
}
# Between whose blocks is no one state per token, or another one after each block than before the next.
NO_STREAM: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3nText",
        {
            **{**_GROUPED, "num_hidden_layers": 5, "intermediate_size": [64] * 5, "sliding_window": 8},
            **{"layer_types": ["sliding_attention"] * 4 + ["full_attention"], "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
            **{"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 5},
        },
    ),
    "rwkv": (
        "Rwkv",
        {
            **{"vocab_size": VOCAB, "hidden_size": WIDTH, "attention_hidden_size": WIDTH},
            **{"num_hidden_layers": BLOCKS, "rescale_every": 2},
        },
    ),
    "xlnet": ("XLNet", {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": BLOCKS, "n_head": 4, "d_inner": 64}),
}
_BIDIRECTIONAL = {
    "gemma3 both ways": ("Gemma3Text", {**_GROUPED, "sliding_window": 8, "use_bidirectional_attention": True}),
    "bert": ("Bert", _SIZE),
    "roberta": ("Roberta", _SIZE),
    "electra": ("Electra", {**_SIZE, "embedding_size": WIDTH}),
    "xlm": ("XLM", {"n_words": VOCAB, "emb_dim": WIDTH, "n_layers": BLOCKS, "n_heads": 4, "causal": False}),
    "roformer": ("RoFormer", {**_SIZE, "embedding_size": WIDTH}),
}
BIDIRECTIONAL: Mapping[str, tuple[str, dict[str, Any]]] = _BIDIRECTIONAL
DECODERS_OF_ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert as a decoder": ("Bert", {**_SIZE, "is_decoder": True}),
    "roberta as a decoder": ("Roberta", {**_SIZE, "is_decoder": True}),
}
ALL = {**SEQUENTIAL, **PARALLEL, **OTHER, **NO_STREAM, **BIDIRECTIONAL, **DECODERS_OF_ENCODERS}


@cache
def whole_model(case: str) -> Any:
    """The model with its head, in float32, with gains that are not one."""
    name, options = ALL[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            elif "norm" in path or "ln" in path or "residual" in path:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def subject_of(case: str, *sites: str, dtype: torch.dtype = torch.float32) -> Subject:
    """The case's model, read at some sites."""
    decoder = decoder_of(whole_model(case))
    if dtype != torch.float32:
        import copy

        decoder = copy.deepcopy(decoder).to(dtype)
    return Subject(decoder, None, name=case, sites=sites or ("layers.1",), device="cpu", keep_blocks=True)

import pytest

from evalkit.subject.sites import site_of_hook


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.8.hook_resid_post", "layers.8"),
        ("blocks.8.hook_resid_pre", "layers.7"),
        ("blocks.0.hook_resid_pre", "layers.0:in"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp"),
        ("blocks.3.hook_attn_out", "layers.3.self_attn"),
        ("blocks.3.attn.hook_z", "layers.3.self_attn.o_proj:in"),
        ("blocks.3.hook_resid_mid", "layers.3.pre_mlp_norm:in"),
        ("blocks.3.mlp.hook_post", "layers.3.mlp.down_proj:in"),
        ("hook_embed", "embed"),
        ("model.layers.12", "layers.12"),
        ("model.layers.12.mlp", "layers.12.mlp"),
        ("model.language_model.layers.12", "layers.12"),
        ("transformer.h.5.attn", "layers.5.self_attn"),
        ("gpt_neox.layers.2.attention.dense:in", "layers.2.self_attn.dense:in"),
        ("h.1", "layers.1"),
        ("model.embed_tokens", "embed"),
        ("layers.4.mlp:in", "layers.4.mlp:in"),
        ("blocks.3.hook_unheard_of", None),
        ("lm_head", None),
        ("", None),
    ],
)
def test_names_of_places(name: str, site: str | None) -> None:
    assert site_of_hook(name) == site

import pytest

from evalkit.subject.sites import BlockSite, parse_site, site_of_hook


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.8.hook_resid_post", "layers.8"),
        ("blocks.8.hook_resid_pre", "layers.7"),
        ("blocks.0.hook_resid_pre", "layers.0:in"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp_out"),
        ("blocks.3.hook_attn_out", "layers.3.attn_out"),
        ("blocks.3.attn.hook_z", "layers.3.self_attn.o_proj:in"),
        ("blocks.3.hook_resid_mid", "layers.3.resid_mid"),
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


@pytest.mark.parametrize(
    ("path", "parsed", "written"),
    [
        ("layers.12", BlockSite(12), "layers.12"),
        ("layers.12:in", BlockSite(12, is_input=True), "layers.12:in"),
        ("layers.0.mlp", BlockSite(0, "mlp"), "layers.0.mlp"),
        (
            "layers.3.self_attn.o_proj:in",
            BlockSite(3, "self_attn.o_proj", is_input=True),
            "layers.3.self_attn.o_proj:in",
        ),
        (
            "model.language_model.layers.7.pre_mlp_norm:in",
            BlockSite(7, "pre_mlp_norm", True),
            "layers.7.pre_mlp_norm:in",
        ),
        ("transformer.h.5.attn", BlockSite(5, "attn"), "layers.5.attn"),
        ("blocks.8.hook_resid_pre", BlockSite(7), "layers.7"),
        ("blocks.0.hook_resid_pre", BlockSite(0, is_input=True), "layers.0:in"),
        ("blocks.8.hook_mlp_out", BlockSite(8, "mlp_out"), "layers.8.mlp_out"),
        ("blocks.1.mlp", BlockSite(1, "mlp"), "layers.1.mlp"),
        ("embed", None, None),
        ("layers.01", None, None),
        ("layers.x", None, None),
        ("mylayers.1", None, None),
        ("layers.1:out", None, None),
        ("", None, None),
    ],
)
def test_sites_are_parsed_and_written_back(path: str, parsed: BlockSite | None, written: str | None) -> None:
    found = parse_site(path)
    assert found == parsed
    assert (None if found is None else str(found)) == written

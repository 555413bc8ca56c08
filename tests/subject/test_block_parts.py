"""Names of places in blocks of many architectures: what is read adds up, or the name is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig
from evalkit.subject.sites import site_of_hook
from tests.support.architectures import (
    BIDIRECTIONAL,
    BLOCKS,
    DECODERS_OF_ENCODERS,
    OTHER,
    PARALLEL,
    SEQUENTIAL,
    VOCAB,
    WIDTH,
    subject_of,
    whole_model,
)

IDS = np.random.default_rng(3).integers(4, VOCAB, size=(2, 24))
HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def places(layer: int) -> dict[str, str]:
    return {hook: str(site_of_hook(f"blocks.{layer}.{hook}")) for hook in HOOKS}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("layer", [0, 2, BLOCKS - 1])
@pytest.mark.parametrize("case", SEQUENTIAL)
def test_parts_of_a_block_add_up(case: str, layer: int) -> None:
    names = places(layer)
    states = subject_of(case, *names.values()).hidden(IDS)
    pre, mid, post, attention, mlp = (states[name] for name in names.values())
    assert close(pre + attention, mid) and close(mid + mlp, post)
    assert attention.abs().max() > 0.01 and mlp.abs().max() > 0.01
    assert not close(attention, mlp, 0.1)


@pytest.mark.parametrize("layer", [0, BLOCKS - 1])
@pytest.mark.parametrize("case", PARALLEL)
def test_parallel_blocks_add_both_and_have_nothing_between(case: str, layer: int) -> None:
    names = places(layer)
    mid = names.pop("hook_resid_mid")
    subject = subject_of(case, *names.values())
    pre, post, attention, mlp = subject.hidden(IDS).values()
    assert close(pre + attention + mlp, post)
    with pytest.raises(BadConfig) as caught:
        subject.hidden(IDS, sites=[mid])
    assert str(caught.value) == (
        f"site 'layers.{layer}.resid_mid': expected its input plus what attention adds in {case}; seen attention and MLP "
        "are added to the block's input at once, so no state lies between them; "
        f"fix: use layers.{layer}, the residual stream after the block, or a module by its own path"
    )


@pytest.mark.parametrize("case", [*PARALLEL, *SEQUENTIAL])
def test_attention_is_what_mixes_positions(case: str) -> None:
    """Told apart by what they do in the first block: an earlier token changes attention's part of a later position."""
    names = places(0)
    subject = subject_of(case, names["hook_attn_out"], names["hook_mlp_out"])
    other = IDS.copy()
    other[:, 0] = (other[:, 0] + 7) % (VOCAB - 4) + 4
    before, after = subject.hidden(IDS), subject.hidden(other)
    attention, mlp = ((after[names[hook]] - before[names[hook]])[:, 1:] for hook in ("hook_attn_out", "hook_mlp_out"))
    assert attention.abs().max() > 1e-3
    if case in PARALLEL:  # there the MLP sees its own position only
        assert mlp.abs().max() < 1e-5


@pytest.mark.parametrize("case", OTHER)
def test_blocks_that_do_not_add_up_are_refused_but_for_their_ends(case: str) -> None:
    subject = subject_of(case)
    states = subject.hidden(IDS, sites=["layers.0", "layers.1:in"])
    assert torch.equal(states["layers.0"], states["layers.1:in"])
    for hook in ("hook_resid_mid", "hook_attn_out", "hook_mlp_out"):
        with pytest.raises(BadConfig, match="seen the block's output is not its input plus what one of its modules"):
            subject.hidden(IDS, sites=[str(site_of_hook(f"blocks.1.{hook}"))])
        assert not subject.in_stream(str(site_of_hook(f"blocks.1.{hook}")))


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("gemma3n", "states of another shape"),
        ("xlnet", "states of another shape"),
        ("rwkv", "block 1 returns other states than block 2 reads"),
    ],
)
def test_what_is_no_residual_stream_is_refused(case: str, seen: str) -> None:
    with pytest.raises(BadConfig, match=rf"site 'layers\.1': .* seen {seen}; fix: use a module by its own path$"):
        subject_of(case, "layers.1")


@pytest.mark.parametrize("case", [*SEQUENTIAL, *PARALLEL])
def test_a_replaced_part_moves_the_stream_by_just_that(case: str) -> None:
    names = places(1)
    subject = subject_of(case)
    step = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = [names["hook_resid_pre"], names["hook_resid_post"]]
    before = subject.hidden(IDS, sites=wanted)
    clean = subject.hidden(IDS, sites=[names["hook_mlp_out"]])[names["hook_mlp_out"]]
    with subject.replaced(names["hook_mlp_out"], lambda states: states + step):
        after = subject.hidden(IDS, sites=wanted)
    assert torch.equal(after[wanted[0]], before[wanted[0]])
    assert close(after[wanted[1]] - before[wanted[1]], step.expand(2, 24, WIDTH), 1e-4)
    with subject.replaced(names["hook_attn_out"], torch.zeros_like):
        without = subject.hidden(IDS, sites=wanted)
        if case in SEQUENTIAL:
            mid = subject.hidden(IDS, sites=[names["hook_resid_mid"]])[names["hook_resid_mid"]]
            assert close(mid, before[wanted[0]], 1e-5)
        else:
            assert close(without[wanted[1]], before[wanted[0]] + clean, 1e-4)


@pytest.mark.parametrize("case", SEQUENTIAL)
def test_the_stream_in_mid_block_can_be_replaced(case: str) -> None:
    """What is put there reaches the MLP and goes past it."""
    names = places(1)
    subject = subject_of(case)
    given = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(2))
    wanted = [names["hook_resid_mid"], names["hook_mlp_out"], names["hook_resid_post"]]

    def replace(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(given, (0, 0, 0, states.shape[1] - 24, 0, states.shape[0] - 2))

    clean = subject.hidden(IDS, sites=wanted)
    with subject.replaced(names["hook_resid_mid"], replace):
        mid, mlp, post = subject.hidden(IDS, sites=wanted).values()
    assert close(mid, given, 1e-4) and close(post, given + mlp, 1e-4)
    assert not close(mlp, clean[names["hook_mlp_out"]], 0.1)


@pytest.mark.parametrize("case", ["bloom", "mpt"])
def test_modules_that_return_the_stream_are_refused_under_the_name_of_their_part(case: str) -> None:
    with pytest.raises(
        BadConfig, match=r"seen one that returns the residual stream, .*use layers\.1\.mlp_out for what"
    ):
        subject_of(case, "layers.1.mlp")


@pytest.mark.parametrize(
    ("case", "attention", "mlp"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
        ("gpt_neo", "attn.attention.out_proj", "mlp.c_proj"),
        ("bloom", "self_attention.dense", "mlp.dense_4h_to_h"),
        ("gpt_neox", "attention.dense", "mlp.dense_4h_to_h"),
        ("opt", "self_attn.out_proj", "fc2"),
        ("mpt", "attn.out_proj", "ffn.down_proj"),
        ("ctrl", "multi_head_attention.dense", "ffn.2"),
        ("gemma2", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt", "attn.c_proj", "mlp.c_proj"),
        ("doge", "self_attn.o_proj", "mlp.down_proj"),
    ],
)
def test_what_goes_into_the_output_projections(case: str, attention: str, mlp: str) -> None:
    """The input of the module that a reader of the architecture's code would name."""
    sites = [str(site_of_hook(f"blocks.1.{hook}")) for hook in ("attn.hook_z", "mlp.hook_post")]
    subject = subject_of(case, *sites)
    heads, inner = subject.hidden(IDS).values()
    caught: dict[str, torch.Tensor] = {}
    block = subject._blocks[1]
    handles = [
        block.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: caught.update({path: args[0].reshape(2, 24, -1)})
        )
        for path in (attention, mlp)
    ]
    with torch.no_grad():
        whole_model(case)(input_ids=torch.from_numpy(IDS), use_cache=False)
    for handle in handles:
        handle.remove()
    assert close(heads, caught[attention]) and close(inner, caught[mlp])


def test_experts_have_no_one_projection() -> None:
    with pytest.raises(BadConfig, match=r"expected the output projection of the MLP in mixtral; seen no one matrix"):
        subject_of("mixtral", "layers.1.mlp.down_proj:in")


@pytest.mark.parametrize(
    ("case", "norm"),
    [
        ("llama", "post_attention_layernorm"),
        ("gemma2", "pre_feedforward_layernorm"),
        ("gpt_neox", "post_attention_layernorm"),
        ("gptj", "ln_1"),
        ("opt", "final_layer_norm"),
        ("falcon with two norms", "ln_mlp"),
        ("glm4", "post_attention_layernorm"),
    ],
)
def test_the_norm_before_the_mlp(case: str, norm: str) -> None:
    subject = subject_of(case, "layers.1.pre_mlp_norm", f"layers.1.{norm}")
    own, named = subject.hidden(IDS).values()
    assert torch.equal(own, named)


@pytest.mark.parametrize("case", ["olmo2", "exaone4"])
def test_a_norm_after_attention_is_not_taken_for_one_before_the_mlp(case: str) -> None:
    with pytest.raises(BadConfig, match=r"expected a norm before the MLP in .* seen no norm gives what the MLP reads"):
        subject_of(case, "layers.1.pre_mlp_norm:in")


@pytest.mark.parametrize("case", BIDIRECTIONAL)
@pytest.mark.parametrize("site", ["layers.0", "embed"])
def test_models_that_see_later_tokens_are_refused(case: str, site: str) -> None:
    with pytest.raises(BadConfig, match="expected a causal language model, in which no state depends on later tokens"):
        subject_of(case, site)


@pytest.mark.parametrize("case", DECODERS_OF_ENCODERS)
def test_the_same_families_are_read_where_they_are_causal(case: str) -> None:
    other = IDS.copy()
    other[:, 12:] = 5
    subject = subject_of(case)
    one, two = (subject.hidden(ids)["layers.1"][:, :12] for ids in (IDS, other))
    assert close(one, two)


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "granite", "bloom", "gpt_neox", "phi", "opt", "mixtral"])
def test_parts_are_the_same_in_bfloat16(case: str) -> None:
    exact, rounded = (subject_of(case, dtype=dtype)._places._parts[1] for dtype in (torch.float32, torch.bfloat16))
    assert rounded.parts.keys() == exact.parts.keys()
    for name, part in exact.parts.items():
        assert rounded.parts[name].path == part.path
        assert rounded.parts[name].factor == part.factor  # the block's own number, not one that was fitted


def test_a_stream_that_dwarfs_what_is_added_does_not_hide_it() -> None:
    """In later blocks of large models: the sum rounds away most of what a block adds."""
    import copy

    from evalkit.subject.loading import decoder_of
    from evalkit.subject.model import Subject

    decoder = copy.deepcopy(decoder_of(whole_model("gemma2"))).to(torch.bfloat16)
    decoder.embed_tokens.weight.data *= 30
    subject = Subject(decoder, None, name="far", sites=["layers.1.mlp_out"], device="cpu", keep_blocks=True)
    parts = subject._places._parts[1].parts
    assert (parts["attn_out"].path, parts["mlp_out"].path) == ("post_attention_layernorm", "post_feedforward_layernorm")


def test_the_width_is_that_of_the_states_not_of_the_embedding() -> None:
    subject = subject_of("opt-350m", "layers.1", "embed")
    assert subject.info.d_model == WIDTH
    assert subject.info.widths == {"layers.1": WIDTH, "embed": WIDTH // 2}
    assert subject.hidden(IDS)["embed"].shape == (2, 24, WIDTH // 2)
    assert subject.hidden(IDS[:0])["layers.1"].shape == (0, 24, WIDTH)


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "glm4", "bloom", "gpt_neox", "granite", "opt"])
def test_what_is_in_the_stream_moves_it_by_just_that(case: str) -> None:
    """A step at a module of the last block, from the MLP on, is the same step in the block's output, or it is not in it."""
    site = f"layers.{BLOCKS - 1}"
    subject = subject_of(case, site)
    step = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    before, found = subject.hidden(IDS)[site], {}
    paths = ["mlp_out", "mlp.down_proj", "mlp", "post_feedforward_layernorm", "post_mlp_layernorm", "fc2"]
    for path in paths:
        try:
            with subject.replaced(f"{site}.{path}", lambda states: states + step):
                moved = subject.hidden(IDS)[site] - before
        except BadConfig:
            continue
        likeness = torch.nn.functional.cosine_similarity(moved, step, dim=-1).min()
        found[path] = bool(likeness > 0.999)
        assert subject.in_stream(f"{site}.{path}") is found[path], path
    assert found["mlp_out"] and found["mlp.down_proj"] is (case not in ("gemma2", "olmo2", "glm4"))
    assert all(subject.in_stream(f"{site}{part}") for part in ("", ":in", ".attn_out")) and subject.in_stream("embed")
    assert not any(
        subject.in_stream(f"{site}.{part}") for part in ("mlp.down_proj:in", "self_attn.o_proj:in", "nothing")
    )


def test_rows_of_the_embedding_are_written_as_they_are_read() -> None:
    """Gemma multiplies them, so that what is replaced is multiplied too."""
    subject = subject_of("gemma2", "embed", "layers.0:in")
    clean = subject.hidden(IDS)
    with subject.replaced("embed", lambda rows: 2 * rows + 1):
        moved = subject.hidden(IDS, sites=["layers.0:in"])["layers.0:in"]
    assert close(moved, (2 * clean["embed"] + 1) * WIDTH**0.5, 1e-4)


def test_what_a_module_reads_is_replaced_before_it_is_read() -> None:
    subject = subject_of("llama", "layers.1.mlp:in", "layers.1.mlp")
    with subject.replaced("layers.1.mlp:in", torch.zeros_like):
        assert subject.hidden(IDS, sites=["layers.1.mlp"])["layers.1.mlp"].abs().max() == 0


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_may_be_named_where_a_site_is_asked_for(hook: str) -> None:
    subject = subject_of("gemma2", f"blocks.2.{hook}", places(2)[hook])
    one, other = subject.hidden(IDS).values()
    assert torch.equal(one, other)

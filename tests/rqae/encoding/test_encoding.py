import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqae import RqaeConfig, RqaeError
from rqae.encoding import products
from rqae.encoding.blocked import GridQuantiser, TableQuantiser
from rqae.encoding.codebook import canonical_indices, grid_codebook
from rqae.literal import encode_literal
from tests.support.random_rqae import identity_rqae, in_float64, random_rqae

FAMILIES = [
    RqaeConfig(32, 4, 5, 23),
    RqaeConfig(32, 3, 7, 9),
    RqaeConfig(32, 4, 4, 9),
    RqaeConfig(32, 2, 9, 8),
    RqaeConfig(32, 4, 2, 5),
    RqaeConfig(32, 1, 5, 4),
    RqaeConfig(32, 4, 3, 12, "fsq"),
    RqaeConfig(32, 5, 40, 11, "learned"),
]


@pytest.fixture(params=["compiled", "plain"], autouse=True, scope="module")
def path(request):
    """Both ways to solve a block of quantizers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr("rqae.encoding.fused.has_compiler", lambda: False)
        yield


@pytest.mark.parametrize(
    "config", FAMILIES, ids=lambda c: f"{c.quantization_method}-{c.codebook_size}-{c.codebook_dim}"
)
def test_both_encodings_follow_the_definition(config):
    model = random_rqae(config)
    x = torch.randn(200, config.dim, generator=torch.Generator().manual_seed(1))
    codes, margins = in_float64(model, x)
    decided = np.minimum.accumulate(margins, axis=1) > 1e-4  # up to the first choice that rounding could turn
    assert decided.mean() > 0.9
    for found in (encode_literal(model, x), model.encode(x)):
        assert found.dtype == torch.int64 and found.shape == codes.shape
        np.testing.assert_array_equal(found.numpy()[decided], codes[decided])


@pytest.mark.parametrize(
    "method,levels,width", [("round_fsq", 5, 4), ("round_fsq", 9, 3), ("fsq", 4, 4), ("learned", 300, 6)]
)
def test_codes_of_many_layers_are_the_oracle_s_but_for_rounding(method, levels, width):
    """A choice that rounding turns changes all later ones of its token: so most of 64 layers, and the error of all."""
    model = random_rqae(RqaeConfig(256, width, levels, 96, method))
    x = torch.randn(1500, 256, generator=torch.Generator().manual_seed(8))
    ours, theirs = model.encode(x), encode_literal(model, x)
    assert float((ours == theirs)[:, :64].float().mean()) > 0.9999
    errors = [float((model.decode(codes) - x).square().mean()) for codes in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_codes_are_canonical_and_decode_adds_up():
    model = random_rqae(RqaeConfig(16, num_quantizers=12))
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    codes = model.encode(x)
    assert codes.shape == (3, 5, 12)
    assert torch.equal(model.canonical[codes], codes)
    expected = sum(model.codebook[i][codes[..., i]] @ model.w_out[i].T + model.b_out[i] for i in range(7))
    torch.testing.assert_close(model.decode(codes, 7), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(codes[..., :7]), expected, rtol=1e-5, atol=1e-5)


def test_layers_add_up_and_depths_come_for_one_decoding():
    model = random_rqae(RqaeConfig(16, num_quantizers=12))
    codes = model.encode(torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(2)))
    parts = [model.codebook[i][codes[..., i]] @ model.w_out[i].T + model.b_out[i] for i in range(12)]
    torch.testing.assert_close(
        model.decode_layers(codes, [9, 0, 4]), parts[9] + parts[0] + parts[4], rtol=1e-5, atol=1e-5
    )
    found = {depth: value.clone() for depth, value in model.reconstructions(codes, (12, 3, 5, 3))}
    assert list(found) == [3, 5, 12]
    for depth, value in found.items():
        torch.testing.assert_close(value, sum(parts[:depth]), rtol=1e-5, atol=1e-5)
    with pytest.raises(RqaeError, match=r"RQAE layers: expected distinct layers from 0 to 11; seen \[3, 12\]"):
        model.decode_layers(codes, [3, 12])
    with pytest.raises(RqaeError, match=r"seen \[3, 3\]"):
        model.decode_layers(codes, [3, 3])
    with pytest.raises(RqaeError, match="RQAE codes: expected 5 codes; seen 4"):
        list(model.reconstructions(codes[..., :4], (5,)))


def test_a_shorter_depth_is_a_prefix():
    model = random_rqae(RqaeConfig(64, num_quantizers=100))
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    whole = model.encode(x)
    for depth in (1, 2, 16, 33, 64, 99):
        assert torch.equal(model.encode(x, depth), whole[:, :depth])


def test_codes_of_a_context_do_not_depend_on_the_batch():
    model = random_rqae(RqaeConfig(576, num_quantizers=64))
    x = torch.randn(2304, 576, generator=torch.Generator().manual_seed(4))
    whole = model.encode(x)
    # MKL sums small products in another order than large ones, oneDNN none but those of one column
    sizes = (1, 7, 513, 1024) if products.has_wide_products() else (128, 384, 1024)
    for size in sizes:
        assert torch.equal(torch.cat([model.encode(part) for part in x.split(size)]), whole)


def test_codes_without_wide_products(monkeypatch):
    model = random_rqae(RqaeConfig(576, num_quantizers=64))
    x = torch.randn(600, 576, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(products, "has_wide_products", lambda: False)
    assert float((model.encode(x) == encode_literal(model, x)).float().mean()) > 0.9995


@given(st.integers(0, 624), st.floats(1e-3, 1e3))
def test_a_code_vector_of_any_length_encodes_to_itself(index, length):
    model = identity_rqae()
    if index == 312:
        return
    codes = model.encode(model.codebook[0, index] * length)
    assert codes.tolist() == [int(model.canonical[index])]
    torch.testing.assert_close(model.decode(codes), model.codebook[0, index])


def test_zero_takes_the_lowest_index():
    model = identity_rqae()
    assert model.encode(torch.zeros(2, 4)).tolist() == [[0], [0]]
    assert encode_literal(model, torch.zeros(2, 4)).tolist() == [[0], [0]]


@pytest.mark.parametrize("levels,p,code", [(2, (1.0, 0, 0, 0), 8), (2, (0, 0, 0, 1.0), 1), (2, (0, -1.0, 0, 1.0), 1)])
def test_ties_take_the_lowest_index(levels, p, code):
    """With levels -1 and 1 the sign of a zero is free: the lowest index has -1 there."""
    model = identity_rqae(levels)
    assert model.encode(torch.tensor([p])).tolist() == [[code]]


vectors = st.lists(st.floats(-10, 10, width=32, allow_subnormal=False), min_size=4, max_size=4)
integers = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4)


@settings(max_examples=300)
@given(st.one_of(vectors, integers), st.sampled_from([2, 3, 4, 5, 7]))
def test_symmetric_quantiser_agrees_with_the_table(p, levels):
    config = RqaeConfig(4, 4, levels, 1)
    codebook, canonical = grid_codebook(levels, 4, rounded=True)[None], canonical_indices(config)
    row = torch.tensor([p])
    fast = int(GridQuantiser(config, codebook, canonical)(row, 0))
    table = int(TableQuantiser(codebook, canonical)(row, 0))
    if fast != table:  # only where the two are equally good to rounding
        unit = row.double()[0] / row.double().norm()
        exact = codebook[0].double() @ unit
        assert abs(float(exact[fast] - exact[table])) < 3e-7
        assert float(exact.max() - exact[fast]) < 3e-7


def test_rebuilt_when_a_weight_changes():
    model = random_rqae(RqaeConfig(16, num_quantizers=4))
    x = torch.randn(50, 16)
    before = model.encode(x)
    model.w_in.neg_()
    model.b_in.neg_()
    after = model.encode(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, encode_literal(model, x))


@pytest.mark.parametrize("rows", [1, 3, 513, 4096])
def test_any_batch_size_gives_the_codes_of_the_definition(rows):
    model = random_rqae(RqaeConfig(64, num_quantizers=24))
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(5))
    assert float((model.encode(x) == encode_literal(model, x)).float().mean()) > 0.9995


def test_strides_and_types_of_the_input_do_not_matter():
    model = random_rqae(RqaeConfig(64, num_quantizers=24))
    x = torch.randn(64, 600, generator=torch.Generator().manual_seed(6)).bfloat16().float()
    expected = model.encode(x.T.contiguous())
    assert torch.equal(model.encode(x.T), expected)
    assert torch.equal(model.encode(x.T.bfloat16()), expected)
    assert torch.equal(model.encode(x.T.double()), expected)
    assert torch.equal(model.encode(torch.stack([x, x], dim=-1)[..., 1].T), expected)
    small = model.encode(x.T, dtype=torch.uint16)
    assert small.dtype == torch.uint16 and torch.equal(small.long(), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_encodes_in_every_mode_of_torch(mode):
    model = random_rqae(RqaeConfig(16, num_quantizers=4))
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(7))
    with mode():
        codes = model.encode(x)
        made_here = random_rqae(RqaeConfig(16, num_quantizers=4))
        assert torch.equal(made_here.encode(x), codes)
    assert torch.equal(codes, model.encode(x)) and torch.equal(codes, model.encode(x.clone().requires_grad_()))


def test_bad_input_is_named_also_in_a_later_chunk():
    model = random_rqae(RqaeConfig(16, num_quantizers=4))
    for bad in (torch.nan, torch.inf):
        x = torch.randn(1500, 16)
        x[1200, 0] = bad
        with pytest.raises(RqaeError, match="RQAE input row 1200: expected finite numbers; seen NaN or infinity"):
            model.encode(x)
    x = torch.randn(3, 16)
    x[1] = 3.3e38
    with pytest.raises(RqaeError, match=r"row 1: expected finite numbers; seen numbers up to 3\.3e\+38"):
        model.encode(x)


def test_bad_input_is_named():
    model = random_rqae(RqaeConfig(16, num_quantizers=4))
    x = torch.randn(6, 16)
    x[4, 3] = torch.nan
    with pytest.raises(RqaeError, match="RQAE input row 4: expected finite numbers; seen NaN or infinity"):
        model.encode(x)
    x[4, 3] = -torch.inf
    with pytest.raises(RqaeError, match="row 4"):
        model.encode(x)
    with pytest.raises(RqaeError, match=r"expected last dimension 16; seen shape \[6, 15\]"):
        model.encode(x[:, :15])
    with pytest.raises(RqaeError, match="depth: expected 1 to 4; seen 5"):
        model.encode(torch.randn(2, 16), 5)
    with pytest.raises(RqaeError, match="expected 0 to 624; seen 0 to 625"):
        model.decode(torch.tensor([[0, 625]]))
    assert model.encode(torch.empty(0, 16)).shape == (0, 4)

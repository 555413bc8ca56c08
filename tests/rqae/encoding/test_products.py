"""Products by either library against float64."""

import pytest
import torch

from rqae.encoding import products

SHAPES = [(1, 64, 1), (5, 3, 7), (64, 64, 1), (100, 64, 513), (4, 2304, 2), (0, 64, 3), (3, 64, 0)]


@pytest.fixture(params=[True, False], ids=["wide", "plain"])
def library(request, monkeypatch):
    if request.param and not products.has_wide_products():
        pytest.skip("no oneDNN, or a processor without AVX512")
    monkeypatch.setattr(products, "has_wide_products", lambda: request.param)


@pytest.mark.parametrize("rows,inner,columns", SHAPES)
@pytest.mark.parametrize("transposed", [True, False])
def test_products_are_those_of_float64(library, rows, inner, columns, transposed):
    g = torch.Generator().manual_seed(rows + columns)
    left, base = torch.randn(rows, 2 * inner, generator=g)[:, :inner], torch.randn(rows, columns, generator=g)
    right = torch.randn(columns, inner, generator=g).T if transposed else torch.randn(inner, columns, generator=g)
    exact = left.double() @ right.double()
    kept = base.clone()
    for found, expected in (
        (products.product(left, right), exact),
        (products.added_product(base, left, right), exact + base.double()),
    ):
        assert found.dtype == torch.float32 and found.shape == (rows, columns)
        torch.testing.assert_close(found.double(), expected, atol=1e-5 * inner**0.5, rtol=0)
    assert torch.equal(base, kept)


def test_no_column_depends_on_the_others():
    """From two columns on; what ``rqae.encoding.blocked`` builds its independence of batches on."""
    if not products.has_wide_products():
        pytest.skip("no oneDNN, or a processor without AVX512")
    g = torch.Generator().manual_seed(0)
    left, right, base = (torch.randn(*shape, generator=g) for shape in ((256, 576), (512, 576), (256, 512)))
    whole, added = products.product(left, right.T), products.added_product(base, left, right.T)
    for count in (2, 5, 37, 128, 300):
        some = slice(count, 2 * count) if 2 * count <= 512 else slice(0, count)
        assert torch.equal(products.product(left, right[some].T), whole[:, some])
        assert torch.equal(products.added_product(base[:, some].contiguous(), left, right[some].T), added[:, some])

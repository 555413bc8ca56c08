"""The shipped RQAE on real hidden states: the fast encoding against the definition, and the fit at its own site."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.records import SubjectInfo
from evalkit.sources import BUNDLED
from evalkit.subject.final_norm import normalise
from evalkit.subject.model import Subject
from rqae import RQAE, held_out_fvu
from rqae.literal import encode_literal

pytestmark = pytest.mark.slow
SITES = ("layers.14", "layers.15", "layers.16")


@pytest.fixture(scope="module")
def model() -> RQAE:
    return RQAE.from_pretrained(BUNDLED / "rqae-256")


@pytest.fixture(scope="module")
def states(smollm2) -> tuple[dict[str, torch.Tensor], SubjectInfo]:
    """Final-normed states of contexts of a text of this repository, their first tokens left out."""
    subject = Subject.load(smollm2, sites=SITES, dtype="float32", device="cpu")
    text = " ".join(path.read_text() for path in sorted(Path("evalkit").glob("*.py")))
    tokens = np.array(subject.tokenizer(text, add_special_tokens=False)["input_ids"][: 128 * 8]).reshape(8, 128)
    hidden = subject.hidden(tokens)
    return {site: normalise(hidden[site][:, 1:], subject.info).flatten(0, 1) for site in SITES}, subject.info


def test_blocked_and_literal_codes_agree(model, states):
    x = states[0]["layers.15"]
    fast, literal = model.encode(x), encode_literal(model, x)
    assert float((fast == literal).float().mean()) > 0.9995
    assert float((fast == literal)[:, :64].float().mean()) > 0.9999
    errors = [float((model.decode(codes) - x).square().mean()) for codes in (fast, literal)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_fits_best_at_its_own_layer(model, states):
    fvu = {site: held_out_fvu(model, x)[256] for site, x in states[0].items()}
    assert fvu["layers.15"] < 0.05
    assert min(fvu, key=lambda site: fvu[site]) == "layers.15"


def test_a_context_encodes_the_same_in_any_batch(model, states):
    x = torch.cat([states[0]["layers.15"], states[0]["layers.14"]])[:1024]
    whole = model.encode(x)
    assert torch.equal(torch.cat([model.encode(part) for part in x.split(128)]), whole)

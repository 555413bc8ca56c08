"""``evalkit inspect`` end to end on a tiny model: its numbers against the parts done by hand, its folder, its mistakes."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from evalkit.cli import app
from evalkit.corpus.contexts import Corpus
from evalkit.inspection.parts import states
from evalkit.inspection.parts.settings import PARTS
from evalkit.inspection.parts.states import RqaeStates
from evalkit.sources.formats.gemma_scope import read_weights
from rqae import RQAE, layer_weights
from rqae.features import intensity_literal
from rqae.literal import encode_literal
from tests.support.command_line import call
from tests.support.dictionaries import write_rqae, write_sae
from tests.support.hardware import quick_dtype

DEPTHS = (1, 2, 8, 24)


@dataclass
class Case:
    """The options of an inspection that works, and what it printed."""

    arguments: list[str]
    model: Path
    rqae: Path
    sae: Path
    out: Path
    stdout: str = ""

    def part(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / f"{name}.json").read_text())


def prepared(model: Path, folder: Path) -> Case:
    generator = np.random.default_rng(0)
    words = ["whale", "ship", "sea", "deck", "calm", "night", "storm", "captain", "1851", "(boat)"]
    lines = [json.dumps({"text": " ".join(generator.choice(words, 120))}) for _ in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    rqae = write_rqae(folder / "rqae", 32, 24, model=str(model), site="layers.3")
    sae = write_sae(folder / "sae", 32, 48, 10, bias=-0.01)
    out = folder / "out"
    arguments = [
        "inspect", str(rqae), "--corpus", str(folder / "text.jsonl"), "--features", "6", "--dtype", "float32",
        "--fit-tokens", "1000000", "--depths", "1,2,8,24", "--context-length", "64", "--out", str(out),
    ]  # fmt: skip
    return Case(arguments, model, rqae, sae, out)


@pytest.fixture(scope="module")
def case(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = prepared(tiny_llama, tmp_path_factory.mktemp("inspect"))
    made.arguments += ["--sae", str(made.sae)]
    result = CliRunner().invoke(app, ["-q", *made.arguments])
    assert result.exit_code == 0, result.output
    made.stdout = result.stdout
    return made


@dataclass
class ByHand:
    """Everything a part needs, from transformers and the literal encoding."""

    corpus: Corpus
    whole: Any
    model: RQAE
    hidden: torch.Tensor  # (N, d) of the valid tokens
    normed: torch.Tensor
    codes: torch.Tensor
    places: np.ndarray


@pytest.fixture(scope="module")
def by_hand(case: Case) -> ByHand:
    corpus, model = Corpus.open(case.out / "corpus"), RQAE.from_pretrained(case.rqae)
    whole = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    ids = torch.from_numpy(corpus.tokens.astype(np.int64))
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states[4]
    places = np.array(
        [(row, position) for row in range(len(ids)) for position in range(1, corpus.lengths[row])], dtype=np.int64
    )
    hidden = states[places[:, 0], places[:, 1]]
    with torch.no_grad():
        normed = whole.model.norm(hidden)
    assert hidden.norm(dim=1).max() < 10 * hidden.norm(dim=1).median()  # no attention sinks in a random model
    return ByHand(corpus, whole, model, hidden, normed, encode_literal(model, normed), places)


def test_prefixes(case: Case, by_hand: ByHand) -> None:
    rows = case.part("prefixes")["rows"]
    assert [row["depth"] for row in rows] == list(DEPTHS)
    for row in rows:
        prefixes = [tuple(codes[: row["depth"]]) for codes in by_hand.codes.tolist()]
        assert row["tokens"] == len(prefixes)
        assert row["prefixes"] == pytest.approx(len(set(prefixes)), abs=2)  # codes may tie to rounding


def test_cosines_and_layers_need_only_the_weights(case: Case, by_hand: ByHand) -> None:
    kinds = {row["kind"]: row for row in case.part("cosines")["rows"]}
    assert set(kinds) == {"within a quantizer", "across quantizers", "all", "random directions"}
    rows = case.part("layers")["rows"]
    lengths = [np.mean([float(by_hand.model.w_out[i, :, column].norm()) for column in range(4)]) for i in range(24)]
    np.testing.assert_allclose([row["weight"] for row in rows], lengths, rtol=1e-5)
    np.testing.assert_allclose([row["cumulative"] for row in rows], np.cumsum(lengths) / sum(lengths), rtol=1e-5)
    np.testing.assert_allclose(layer_weights(by_hand.model), lengths, rtol=1e-5)


def test_fvu_and_loss(case: Case, by_hand: ByHand) -> None:
    part = case.part("fit")
    gain, scale = by_hand.whole.model.norm.weight.detach(), (by_hand.hidden.square().mean(-1, True) + 1e-6).rsqrt()
    clean, documents = losses_by_hand(by_hand, lambda hidden: hidden)
    assert part["further"]["loss"] == pytest.approx(clean.mean(), abs=1e-4)
    assert (part["further"]["tokens"], part["further"]["predictions"]) == (len(by_hand.hidden), len(clean))
    ablated = {}
    for name, state in (("zero", torch.zeros(32)), ("mean", by_hand.hidden.mean(0))):
        ablated[name] = (
            losses_by_hand(by_hand, lambda hidden, state=state: state.expand_as(hidden))[0].mean() - clean.mean()
        )
        assert part["further"]["ablated"][name]["mean"] == pytest.approx(ablated[name], abs=1e-4)
    for row in part["rows"]:
        rebuilt = by_hand.model.decode(by_hand.codes, row["depth"])
        for name, truth, guess in (
            ("fvu", by_hand.hidden, rebuilt / gain / scale),
            ("fvu_normed", by_hand.normed, rebuilt),
        ):
            fvu = (truth - guess).square().sum() / (truth - truth.mean(0)).square().sum()
            assert row[name] == pytest.approx(float(fvu), rel=1e-3)

        def replaced(hidden: torch.Tensor, depth: int = row["depth"]) -> torch.Tensor:
            scale = (hidden.square().mean(-1, True) + 1e-6).rsqrt()
            return by_hand.model.decode(encode_literal(by_hand.model, hidden * scale * gain, depth)) / gain / scale

        losses, _ = losses_by_hand(by_hand, replaced)
        difference = losses - clean
        assert row["loss_change"] == pytest.approx(difference.mean(), abs=1e-3)
        sums = [difference[documents == document].sum() - (documents == document).sum() * difference.mean()
                for document in np.unique(documents)]  # fmt: skip
        se = np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(losses)
        assert row["se"] == pytest.approx(se, rel=0.05, abs=1e-5)
        for name, cost in ablated.items():
            assert row[f"recovered_{name}"] == pytest.approx(1 - difference.mean() / cost, abs=2e-2)


def losses_by_hand(by_hand: ByHand, replace: Any) -> tuple[np.ndarray, np.ndarray]:
    """Losses of all predictions between valid tokens, one context at a time, with a plain hook at the block."""

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1], replace(output[0, 1:])[None]], dim=1)

    losses, documents = [], []
    handle = by_hand.whole.model.layers[3].register_forward_hook(hook)
    try:
        for row in range(by_hand.corpus.n_contexts):
            ids = torch.from_numpy(by_hand.corpus.tokens[row, : by_hand.corpus.lengths[row]].astype(np.int64))
            with torch.no_grad():
                chances = by_hand.whole(ids[None]).logits[0].log_softmax(-1)
            for position in range(1, len(ids) - 1):
                losses.append(-float(chances[position, ids[position + 1]]))
                documents.append(int(by_hand.corpus.documents[row]))
    finally:
        handle.remove()
    return np.array(losses), np.array(documents)


def test_ranks(case: Case, by_hand: ByHand) -> None:
    part = case.part("ranks")
    assert part["further"]["top"] == 128 and len(part["further"]["centres"]) == 6
    tokens = [centre.split("@")[0] for centre in part["further"]["centres"]]
    assert len(set(tokens)) == 6  # different token ids
    rows = []
    for centre in part["further"]["centres"]:
        token, place = centre.split("@")
        context, position = map(int, place.split("."))
        assert by_hand.corpus.tokens[context, position] == int(token)
        rows.append(by_hand.places.tolist().index([context, position]))
    for row, line in zip(part["rows"], part["further"]["values"], strict=True):
        if row["depth"] < 8:
            continue  # many intensities tie there, and which of them are taken decides
        every = intensity_literal(by_hand.model, by_hand.codes, by_hand.codes[rows], row["depth"]).numpy()
        for feature, centre in enumerate(rows):
            values = every[:, feature].copy()
            values[centre] = -2
            best = np.argsort(-values, kind="stable")[:128]
            cosines = torch.cosine_similarity(by_hand.normed[best], by_hand.normed[[centre]])
            assert line[feature] == pytest.approx(spearmanr(values[best], cosines).statistic, abs=0.02)
        assert row["mean"] == pytest.approx(np.mean(line))
        assert row["se"] == pytest.approx(np.std(line, ddof=1) / np.sqrt(6))


def test_sae(case: Case, by_hand: ByHand) -> None:
    part = case.part("sae")
    weights = read_weights(case.sae / "params.npz")
    latents = [int(name) for name in part["further"]["latents"]]
    assert 3 <= len(latents) <= 6
    values = np.array(part["further"]["values"])
    assert values.shape == (2, 2, 4, len(latents))
    fires = torch.relu(by_hand.hidden @ weights.w_enc + weights.b_enc)[:, latents].numpy()
    gain = by_hand.whole.model.norm.weight.detach()
    contexts = by_hand.places[:, 0]
    for number, latent in enumerate(latents):
        column = weights.w_enc[:, latent]
        feature = encode_literal(by_hand.model, (column / column.square().mean().sqrt() * gain)[None])
        best = int(fires[:, number].argmax())
        peaks = pd.Series(fires[:, number]).groupby(contexts).max()
        top = peaks[peaks > 0].sort_values(ascending=False, kind="stable").index[:10]
        rows = np.flatnonzero(np.isin(contexts, top))
        found = intensity_literal(by_hand.model, by_hand.codes[rows], feature, 24)[:, 0]
        assert values[0, 0, 3, number] == pytest.approx(pearsonr(fires[rows, number], found).statistic, abs=5e-3)
        others = rows[rows != best]
        found = intensity_literal(by_hand.model, by_hand.codes[others], by_hand.codes[[best]], 24)[:, 0]
        assert values[1, 0, 3, number] == pytest.approx(pearsonr(fires[others, number], found).statistic, abs=5e-3)


def test_figures_and_tables_are_there(case: Case) -> None:
    for name in PARTS:
        assert (case.out / "plots" / f"{name}.png").stat().st_size > 10_000
        assert (case.out / "plots" / f"{name}.svg").stat().st_size > 2_000
    assert case.stdout.startswith(
        f"# {case.model}/layers.3/rqae/rqae\n\n## Unique code prefixes\n\n| depth | prefixes |"
    )
    assert case.stdout.count("\n## ") == 6


def test_the_same_command_computes_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(states, "find_model", None)
    before = {path: path.stat().st_mtime_ns for path in case.out.glob("*.json")}
    pictures = {path: path.read_bytes() for path in (case.out / "plots").iterdir()}
    code, out, err = call(capsys, monkeypatch, "-q", *case.arguments)
    assert (code, out) == (0, case.stdout), err
    assert {path: path.stat().st_mtime_ns for path in case.out.glob("*.json")} == before
    assert {path: path.read_bytes() for path in (case.out / "plots").iterdir()} == pictures


def test_json_and_csv_hold_every_row(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, monkeypatch, "-q", *case.arguments, "--json")
    found = json.loads(out)
    assert code == 0 and list(found["parts"]) == list(PARTS)
    assert {key: found[key] for key in ("format", "kind", "width", "l0")} == {
        "format": "rqae", "kind": "rqae", "width": 24, "l0": 24.0,
    }  # fmt: skip
    assert found["name"] == f"{case.model}/layers.3/rqae/rqae" and found["site"] == f"{case.model}/layers.3"
    assert found["fvu"] == case.part("fit")["rows"][-1]["fvu"]
    assert found["parts"]["layers"] == case.part("layers")["rows"]
    code, out, _ = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "layers,prefixes", "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert table["part"].tolist() == ["prefixes"] * 4 + ["layers"] * 24
    np.testing.assert_array_equal(table["weight"].dropna(), [row["weight"] for row in found["parts"]["layers"]])


def test_only_what_changed_is_computed_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pass for the codes, also when an SAE, other features and other depths come later."""
    case = prepared(tiny_llama, tmp_path)
    passes: list[int] = []
    read = RqaeStates._read_shard
    monkeypatch.setattr(RqaeStates, "_read_shard", lambda self, *rest: passes.append(rest[0]) or read(self, *rest))
    code, out, err = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "prefixes,ranks")
    assert code == 0 and out.count("\n## ") == 2, err
    shards = passes.copy()
    assert shards == sorted(set(shards))
    first = case.part("ranks")
    code, *_ = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "ranks", "--seed", 1)
    assert code == 0 and passes == shards and case.part("ranks")["rows"] != first["rows"]
    code, *_ = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "sae", "--sae", case.sae)
    assert code == 0 and passes == shards + shards  # now the latents are recorded
    code, *_ = call(capsys, monkeypatch, "-q", *case.arguments, "--only", "sae", "--sae", case.sae, "--depths", "24")
    assert code == 0 and passes == shards + shards


def test_one_pass_serves_codes_and_latents_and_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle of the pass; then the same command, to the same numbers."""
    again = prepared(case.model, tmp_path)
    again.arguments += ["--sae", str(again.sae)]
    monkeypatch.setattr("evalkit.collect.activations.SHARD_CONTEXTS", 8)
    read, passes = RqaeStates._read_shard, list[int]()

    def stop(self: RqaeStates, shard: int, limit: float) -> Any:
        if shard == 2 and not passes.count(2):
            passes.append(shard)
            raise KeyboardInterrupt
        passes.append(shard)
        return read(self, shard, limit)

    monkeypatch.setattr(RqaeStates, "_read_shard", stop)
    code, *_ = call(capsys, monkeypatch, "-q", *again.arguments)
    assert code == 130
    code, _, err = call(capsys, monkeypatch, "-q", *again.arguments)
    assert code == 0, err
    for name in PARTS:
        assert again.part(name)["rows"] == case.part(name)["rows"], name


MISTAKES = {
    "no such part": (["--only", "loss"], "--only: expected some of prefixes"),
    "sae without one": (["--only", "sae"], "fix: add --sae DICT"),
    "depth too deep": (["--depths", "1,25"], "depths: expected depths from 1 to 24, the number of quantizers"),
    "format": (["--format", "latex"], "format: expected one of markdown, csv, json"),
    "no such model": (["--model", "nowhere/model"], "nowhere/model"),
    "dtype": (["--dtype", "int8"], "dtype: expected bfloat16 or float32"),
    "no tokens": (["--max-tokens", "0"], "max_tokens: expected at least 1"),
    "corpus": (["--corpus", "nowhere.jsonl"], "nowhere.jsonl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, fragment = MISTAKES[mistake]
    code, out, err = call(capsys, monkeypatch, "-q", *prepared(tiny_llama, tmp_path).arguments, *options)
    assert (code, out) == (2, ""), err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert fragment in err and "Traceback" not in err


def test_other_dictionaries_are_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = "bundled:sae/layer_15/width_1k/average_l0_32"
    several = str(Path(sae).parent.parent)
    code, _, err = call(capsys, monkeypatch, "-q", "inspect", several, "--out", tmp_path / "a")
    assert code == 2 and "expected one dictionary; seen 5: smollm2-135m/layers.15/sae/width-1024/l0-32, " in err
    code, _, err = call(capsys, monkeypatch, "-q", "inspect", sae, "--sae", sae, "--out", tmp_path / "a")
    assert code == 2 and "--sae: expected an RQAE to compare with that SAE; seen smollm2-135m/" in err
    code, _, err = call(capsys, monkeypatch, "-q", *case.arguments, "--sae", case.rqae)
    assert code == 2 and "expected a single SAE; seen one of kind rqae" in err
    code, _, err = call(capsys, monkeypatch, "-q", *case.arguments, "--sae", sae)
    assert code == 2 and "expected an SAE of layers.3 with d_model 32, the site of" in err
    assert "seen layers.15, d_model 576; fix: use an SAE of that site" in err
    narrow = write_sae(tmp_path, 16, 48, 10)
    code, _, err = call(capsys, monkeypatch, "-q", *case.arguments, "--sae", narrow)
    assert code == 2 and "seen layers.3, d_model 16; fix: use an SAE of that site" in err


def test_another_text_needs_another_folder(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, monkeypatch, "-q", *case.arguments[:-2], "--only", "prefixes", "--max-tokens", 640)
    assert (code, out) == (2, "")
    assert "expected an inspection with max_tokens = 640; seen max_tokens = 100000; fix: use another --out" in err


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["inspect", "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output and "evalkit inspect bundled:rqae-256" in " ".join(result.output.split())


@pytest.mark.slow
def test_the_shipped_rqae_on_the_real_model(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its card declares is measured, what is known of RQAEs holds."""
    code, out, err = call(
        capsys, monkeypatch, "-q", "inspect", "bundled:rqae-256", "--model", smollm2, "--out", tmp_path / "out",
        "--sae", "bundled:sae/layer_15/width_2k/average_l0_32", "--max-tokens", 8000, "--fit-tokens", 2000,
        "--features", 10, "--depths", "1,4,16,64,256", "--json", "--dtype", quick_dtype(),
    )  # fmt: skip
    assert code == 0, err
    parts = json.loads(out)["parts"]
    prefixes = {row["depth"]: row for row in parts["prefixes"]}
    assert prefixes[1]["prefixes"] <= 544 and prefixes[16]["alone"] > 0.98
    cosines = {row["kind"]: row for row in parts["cosines"]}
    assert cosines["across quantizers"]["small"] > 0.99 and cosines["all"]["small"] > 0.98
    weights = [row["weight"] for row in parts["layers"]]
    assert weights[0] == max(weights) and weights[0] > 5 * weights[-1]
    fit = {row["depth"]: row for row in parts["fit"]}
    assert [fit[depth]["fvu"] for depth in (16, 64, 256)] == pytest.approx([0.4926, 0.1922, 0.0148], rel=0.1)
    costs = [fit[depth]["loss_change"] for depth in (1, 4, 16, 64, 256)]
    assert costs == sorted(costs, reverse=True) and costs[0] > 2 and abs(costs[-1]) < 0.05
    assert fit[256]["recovered_zero"] > 0.99
    ranks = {row["depth"]: row["mean"] for row in parts["ranks"]}
    assert ranks[4] < ranks[64] and ranks[64] > 0.4
    top = {
        row["depth"]: row["mean"]
        for row in parts["sae"]
        if (row["made_from"], row["examples"]) == ("encoder column", "top")
    }
    assert top[256] > 0.4 and top[256] > top[4]

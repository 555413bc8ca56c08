from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from evalkit.errors import BadConfig, InputError, StorageError
from evalkit.report.plots.files import plot_run
from evalkit.report.plots.score_panels import arrange
from evalkit.report.plots.scores_figure import scores_figure
from evalkit.report.plots.style import names_of, palette, short_number
from evalkit.report.rows import Source, score_rows, sorted_sources
from evalkit.stats.standard_errors import macro_mean
from evalkit.store.frames import RunFrames
from tests.support.simulated import NAMES, simulate


@pytest.fixture(scope="module")
def frames() -> RunFrames:
    return simulate(n_features=8, n_each=8)


def source(
    name: str, kind: str = "sae", width: int | None = None, l0: float | None = None, depth: int | None = None
) -> Source:
    return Source(name, kind, "m/layers.1", width, l0, depth, n_tried=1, n_failed=0)


def texts(path: Path) -> str:
    return " ".join(" ".join(node.itertext()) for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}text"))


def test_four_files_that_say_what_they_show(frames: RunFrames, tmp_path: Path) -> None:
    paths = plot_run(frames, tmp_path / "plots")
    assert [path.name for path in paths] == ["scores.png", "scores.svg", "features.png", "features.svg"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in paths)
    assert image.imread(paths[0]).shape[1] >= 1200
    scores, features = texts(paths[1]), texts(paths[3])
    for words in ("width 2k", "L0 ≈ 32", "RQAE", "detection", "fuzzing", "256", "controls", "shuffled explanations"):
        assert words in scores
    for words in ("n = ", "judge: embedding", "Explainer: words", "one SE"):
        assert words in scores.replace("\n", " ") and words in features.replace("\n", " ")
    assert "SAE 2k · L0 16" in features and "random directions" in features


def test_the_same_records_give_the_same_bytes_whatever_the_users_style(frames: RunFrames, tmp_path: Path) -> None:
    first = plot_run(frames, tmp_path / "a", metric="f1")
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9}):
        mixed = replace(frames, judgements=frames.judgements.sample(frac=1, random_state=1))
        second = plot_run(mixed, tmp_path / "b", metric="f1")
        assert mpl.rcParams["font.size"] == 20
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]
    assert b"<dc:date>" not in first[1].read_bytes()


def test_the_points_drawn_are_the_means_and_errors_of_the_rows(frames: RunFrames) -> None:
    rows = [row for row in score_rows(frames, ("auroc",)) if row.scorer == "detection"]
    figure = scores_figure(rows)
    drawn = {}
    for axes in figure.axes:
        for container in axes.containers:
            point, _, bars = container.lines
            ends = bars[0].get_segments()[0][:, 1]
            drawn[round(float(point.get_ydata()[0]), 9)] = (ends[1] - ends[0]) / 2
    for row in rows:
        if row.source.kind == "null-planted":
            continue  # above the axis: an arrow with its value
        for estimate in (macro_mean(row.real), macro_mean(row.shuffled)):
            assert drawn[round(estimate.mean, 9)] == pytest.approx(estimate.se)
    planted = next(row for row in rows if row.source.kind == "null-planted")
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert f"{macro_mean(planted.real).mean:.2f}" in said


@pytest.mark.parametrize(
    "names",
    [NAMES[:3], [NAMES[4]], [NAMES[3], NAMES[4]], NAMES[4:7], [NAMES[3], NAMES[5], NAMES[7]], [NAMES[8]]],
    ids=["only RQAE", "one SAE", "no shared width or L0", "one width", "one L0", "only a control"],
)
def test_any_subset_of_a_sweep_can_be_drawn(names: list[str], tmp_path: Path) -> None:
    paths = plot_run(simulate(n_features=3, names=names, scorers=["fuzzing"]), tmp_path)
    assert all(path.stat().st_size > 5000 for path in paths)


def test_one_feature_and_dictionaries_without_any_score_can_be_drawn(frames: RunFrames, tmp_path: Path) -> None:
    plot_run(simulate(n_features=1, names=NAMES[3:5]), tmp_path)
    plot_run(replace(frames, judgements=frames.judgements.query("source != @NAMES[4] and control == ''")), tmp_path)
    assert "no feature scored" in texts(tmp_path / "features.svg")


def test_panels_take_the_width_with_most_l0s_and_the_l0_shared_by_most_widths(frames: RunFrames) -> None:
    panels = arrange(sorted_sources(frames))
    assert (panels.width, panels.l0) == (2048, 32.4)
    assert [item.l0 for item in panels.by_l0] == [16.4, 33.1, 62.8]
    assert [item.width for item in panels.by_width] == [1024, 2048, 4096]
    assert [item.depth for item in panels.rqae] == [16, 64, 256]
    assert len(panels.controls) == 3 and not panels.left_out


def test_panels_do_not_place_what_has_no_place() -> None:
    far, unsized = source("far", width=8192, l0=400.0), source("unsized", width=8192)
    near = [source("a", width=1024, l0=30.0), source("b", width=2048, l0=40.0), source("c", width=2048, l0=90.0)]
    panels = arrange([*near, far, unsized])
    assert [item.name for item in panels.by_width] == ["a", "b"]
    assert panels.left_out == (far,) and panels.others == (unsized,)
    assert arrange([unsized]).by_l0 == () and arrange([unsized]).l0 is None


def test_dictionaries_without_width_or_l0_have_a_strip_of_their_own(tmp_path: Path) -> None:
    """A dump of ready examples alone: there is nothing else to draw."""
    frames = simulate(n_features=6, n_each=6)
    kept = frames.sources["kind"] == "sae"
    sources = frames.sources[kept].head(2).assign(width=pd.NA, l0=float("nan"))
    names = set(sources["name"])
    alone = replace(
        frames,
        sources=sources,
        features=frames.features[frames.features["source"].isin(names)],
        judgements=frames.judgements[frames.judgements["source"].isin(names)],
    )
    assert {path.name for path in plot_run(alone, tmp_path)} >= {"scores.png", "features.png"}


def test_names_are_short_and_unambiguous() -> None:
    sources = [source("x", width=16384, l0=71.3), source("y", width=16384, l0=71.4), source("z", "rqae", depth=64)]
    assert names_of(sources) == {"x": "x", "y": "y", "z": "RQAE 64"}
    assert names_of(sources[1:])["y"] == "SAE 16k · L0 71"
    assert [short_number(v) for v in (576, 1000, 1024, 24576, 1048576, 31.2, 8.25, 5500)] == [
        *("576", "1k", "1k", "24k", "1M", "31", "8.2", "5.5k")
    ]


def test_kinds_have_colours_of_their_own() -> None:
    kinds = ("rqae", "sae", "transcoder", "crosscoder", "null-planted", "null-permuted")
    colours = palette([source(kind, kind) for kind in kinds])
    assert len({colours[kind] for kind in kinds}) == len(kinds)


def test_a_metric_the_run_does_not_have_is_refused_in_one_line(frames: RunFrames, tmp_path: Path) -> None:
    plain = replace(frames, judgements=frames.judgements.assign(confidence=np.nan))
    with pytest.raises(InputError) as error:
        plot_run(plain, tmp_path)
    assert str(error.value) == (
        "metric auroc: expected at least one feature with a score; seen none in this run; fix: plot another metric "
        "(auroc and auprc need a judge that gives a confidence)"
    )
    with pytest.raises(BadConfig, match="seen 'precision'"):
        plot_run(frames, tmp_path, metric="precision")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(frames: RunFrames, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError) as error:
        plot_run(frames, tmp_path / "taken")
    assert error.value.subject == str(tmp_path / "taken" / "scores.png")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]

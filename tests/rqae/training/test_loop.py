from dataclasses import replace

import numpy as np
import pytest
import torch

from rqae import RQAE, RqaeConfig, RqaeError, RqaeTrainingConfig, held_out_fvu, train_rqae
from rqae.training.gradients import loss_and_gradients
from tests.support.random_rqae import random_rqae

SMALL = RqaeTrainingConfig(
    dim=24, num_quantizers=12, init_tokens=2000, steps=30, batch_tokens=256, warmup_steps=5, checkpoint_every=10
)


def activations(count: int, seed: int, dim: int = 24) -> torch.Tensor:
    """Rows of one length, as a norm gives, with a mean and unequal directions."""
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) * torch.linspace(2, 0.1, dim)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=g) @ mixing.T + torch.linspace(-3, 3, dim)
    return rows * torch.rsqrt(rows.square().mean(dim=1, keepdim=True))


TRAIN, HELD_OUT = activations(8000, 1), activations(2000, 2)


@pytest.mark.parametrize("method,size", [("round_fsq", 5), ("fsq", 3), ("vq", 30)])
def test_gradients_agree_with_autograd_on_the_definition(method, size):
    model = random_rqae(RqaeConfig(24, 4, size, 6, method))
    x = activations(50, 3)
    layers = {name: getattr(model, name) for name in ("w_in", "b_in", "w_out", "b_out")}
    squared, gradients, codes = loss_and_gradients(x, layers, model.encoder())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in layers.items()}
    residual, total = x, torch.zeros_like(x)
    for i in range(6):
        p = residual @ leaves["w_in"][i].T + leaves["b_in"][i]
        straight_through = p + (model.codebook[i][codes[:, i]] - p).detach()
        out = straight_through @ leaves["w_out"][i].T + leaves["b_out"][i]
        residual, total = residual - out.detach(), total + out
    loss = (total - x).square().mean()
    loss.backward()
    assert float(squared.sum() / x.numel()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad, rtol=1e-4, atol=1e-6)


def test_nested_depths_weigh_relative_changes_alike():
    model = random_rqae(RqaeConfig(24, num_quantizers=6))
    x = activations(50, 3)
    layers = {name: getattr(model, name) for name in ("w_in", "b_in", "w_out", "b_out")}
    squared, gradients, codes = loss_and_gradients(x, layers, model.encoder(), nested_depths=(4, 1, 6, 9))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in layers.items()}
    residual, total, losses = x, torch.zeros_like(x), {}
    for i in range(6):
        p = residual @ leaves["w_in"][i].T + leaves["b_in"][i]
        out = (p + (model.codebook[i][codes[:, i]] - p).detach()) @ leaves["w_out"][i].T + leaves["b_out"][i]
        residual, total = residual - out.detach(), total + out
        losses[i + 1] = (total - x).square().mean()
    sum(losses[6].detach() / losses[depth].detach() * losses[depth] for depth in (1, 4, 6)).backward()
    assert float(squared.sum() / x.numel()) == pytest.approx(float(losses[6].detach()), rel=1e-5)
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad, rtol=1e-4, atol=1e-6)


def test_nested_depths_help_the_shallow_and_cost_the_whole_little():
    config = replace(SMALL, steps=100)
    _, plain = train_rqae(TRAIN, config, held_out=HELD_OUT)
    _, nested = train_rqae(TRAIN, replace(config, nested_depths=(4,)), held_out=HELD_OUT)
    assert nested.fvu_held_out[4] < plain.fvu_held_out[4]
    assert nested.fvu_held_out[12] < 1.1 * plain.fvu_held_out[12]


def test_low_precision_gradients_point_the_same_way_and_train_as_well():
    model = random_rqae(RqaeConfig(24, 4, 5, 6))
    layers = {name: getattr(model, name) for name in ("w_in", "b_in", "w_out", "b_out")}
    x = activations(500, 3)
    _, exact, _ = loss_and_gradients(x, layers, model.encoder())
    _, low, _ = loss_and_gradients(x, layers, model.encoder(), "bfloat16")
    for name, gradient in exact.items():
        assert low[name].dtype == torch.float32
        assert float(torch.cosine_similarity(low[name].flatten(), gradient.flatten(), dim=0)) > 0.999
    assert not torch.equal(low["w_in"], exact["w_in"])
    reports = [
        train_rqae(TRAIN, replace(SMALL, precision=each), held_out=HELD_OUT)[1] for each in ("float32", "bfloat16")
    ]
    assert reports[1].fvu_held_out[12] == pytest.approx(reports[0].fvu_held_out[12], rel=0.03)


def pca_fvu(train: torch.Tensor, rows: torch.Tensor, components: int) -> float:
    mean = train.mean(dim=0)
    _, _, v = torch.linalg.svd(train - mean, full_matrices=False)
    kept = (rows - mean) @ v[:components].T @ v[:components]
    return float((rows - mean - kept).square().sum() / (rows - rows.mean(dim=0)).square().sum())


def test_beats_its_start_a_random_start_and_pca_of_some_components():
    model, report = train_rqae(TRAIN, SMALL, held_out=HELD_OUT)
    assert report.steps == 30 and report.tokens == 30 * 256
    assert set(report.fvu_held_out) == {1, 4, 12}
    assert report.fvu_held_out[12] < report.fvu_start[12]
    assert report.fvu_held_out[12] < pca_fvu(TRAIN, HELD_OUT, 12)
    assert report.fvu_held_out[1] > report.fvu_held_out[4] > report.fvu_held_out[12]
    _, random = train_rqae(TRAIN, replace(SMALL, initialisation="random"), held_out=HELD_OUT)
    assert report.fvu_held_out[12] < random.fvu_held_out[12] < random.fvu_start[12]
    error = (model.decode(model.encode(HELD_OUT)) - HELD_OUT).square().sum()
    variance = (HELD_OUT - HELD_OUT.mean(dim=0)).square().sum()
    assert report.fvu_held_out[12] == pytest.approx(float(error / variance), rel=1e-4)


def test_the_curve_is_the_held_out_fvu_on_the_way():
    _, report = train_rqae(TRAIN, replace(SMALL, evaluate_every=7), held_out=HELD_OUT)
    assert [step for step, _ in report.curve] == [0, 7, 14, 21, 28, 30]
    assert report.curve[0][1] == report.fvu_start[12] and report.curve[-1][1] == report.fvu_held_out[12]
    _, short = train_rqae(TRAIN, replace(SMALL, steps=0), held_out=HELD_OUT)
    assert short.curve[0][1] == report.curve[0][1]


def test_the_dead_share_counts_codes_that_nothing_takes():
    one_line = torch.linspace(1, 2, 3000)[:, None] * torch.ones(24)
    _, report = train_rqae(one_line, replace(SMALL, num_quantizers=2, steps=30))
    assert report.dead_share > 0.9
    _, report = train_rqae(TRAIN, SMALL)
    assert report.dead_share < 0.5


def test_counts_are_the_shares_of_the_codes():
    model, _ = train_rqae(TRAIN, SMALL)
    torch.testing.assert_close(model.codebook_counts.sum(dim=1), torch.ones(12), rtol=0, atol=1e-4)
    used = model.encode(TRAIN[:4000])[:, 0]
    shares = torch.bincount(used, minlength=625) / len(used)
    assert float((model.codebook_counts[0] - shares).abs().sum()) < 0.5
    assert float(model.codebook_counts[:, model.canonical != torch.arange(625)].sum()) == 0


def same(a: RQAE, b: RQAE) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_seeded_and_the_same_from_an_array_a_memory_map_or_a_tensor(tmp_path):
    first, _ = train_rqae(TRAIN, SMALL)
    np.save(tmp_path / "rows.npy", TRAIN.numpy())
    second, _ = train_rqae(np.load(tmp_path / "rows.npy", mmap_mode="r"), SMALL)
    other, _ = train_rqae(TRAIN, replace(SMALL, seed=1))
    assert same(first, second)
    assert not same(first, other)


class Interrupted(Exception):
    pass


class StopsAt:
    """Progress that breaks off the training after some steps."""

    def __init__(self, limit: int) -> None:
        self.limit, self.seen, self.started, self.finished = limit, 0, [], 0

    def start(self, description, total, unit):
        self.started.append((description, total, unit))
        return len(self.started)

    def advance(self, task, amount=1):
        self.seen += amount * (task == len(self.started) and "all" in self.started[-1][0])
        if self.seen == self.limit:
            raise Interrupted

    def finish(self, task):
        self.finished += 1


@pytest.mark.parametrize("stream", [False, True])
def test_resumed_training_ends_the_same(tmp_path, stream):
    def source():
        return iter(TRAIN.split(700)) if stream else TRAIN

    whole, uninterrupted = train_rqae(source(), SMALL)
    config = replace(SMALL, checkpoint=tmp_path / "training.pt")
    with pytest.raises(Interrupted):
        train_rqae(source(), config, progress=StopsAt(17))
    resumed, report = train_rqae(source(), config)
    assert same(whole, resumed)
    assert [step for step, _ in report.losses] == list(range(1, 31)) and report.losses == uninterrupted.losses
    assert report.tokens == 20 * 256 and report.steps == 30  # steps 10 to 29 were done again
    with pytest.raises(
        RqaeError, match="expected a checkpoint of this training configuration and these activations; seen another"
    ):
        train_rqae(source(), replace(config, learning_rate=1.0))
    with pytest.raises(RqaeError, match="or other activations"):
        train_rqae(HELD_OUT, config)


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"config": Payload()}, tmp_path / "training.pt")
    with pytest.raises(RqaeError, match="expected a training checkpoint"):
        train_rqae(TRAIN, replace(SMALL, checkpoint=tmp_path / "training.pt"))
    assert not (tmp_path / "ran").exists()


def test_progress_is_told_of_both_stages():
    progress = StopsAt(10**9)
    train_rqae(TRAIN, SMALL, progress=progress)
    assert progress.started == [
        ("fitting quantizers in sequence", 12, "quantizers"),
        ("training all quantizers", 30, "steps"),
    ]
    assert progress.seen == 30 and progress.finished == 2


def test_bad_rows_and_options():
    with pytest.raises(RqaeError, match=r"training activations: expected rows of 24 numbers; seen shape \[256, 23\]"):
        train_rqae(TRAIN[:, :23], SMALL)
    with pytest.raises(RqaeError, match="expected at least one row; seen none"):
        train_rqae(iter([]), SMALL)
    broken = TRAIN.clone()
    broken[:, 3] = torch.nan
    with pytest.raises(RqaeError, match="expected finite numbers"):
        train_rqae(broken, SMALL)
    with pytest.raises(RqaeError, match=r"'nested_depths': expected depths from 1 to 12; seen \[4, 13\]"):
        train_rqae(TRAIN, replace(SMALL, nested_depths=(4, 13)))
    with pytest.raises(RqaeError, match="'batch_tokens': expected at least 1; seen 0"):
        train_rqae(TRAIN, replace(SMALL, batch_tokens=0))


def test_degenerate_data_trains_without_nan():
    low_rank = TRAIN[:, :3] @ torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    model, report = train_rqae(low_rank, SMALL, held_out=low_rank)
    assert report.fvu_held_out[12] < 0.05
    constant = torch.ones(500, 24)
    model, _ = train_rqae(constant, replace(SMALL, steps=3))
    torch.testing.assert_close(model.decode(model.encode(constant)), constant, rtol=0, atol=1e-2)


def test_held_out_fvu_of_perfect_and_mean_reconstruction():
    model = random_rqae(RqaeConfig(24, num_quantizers=2))
    model.w_out.zero_()
    model.b_out.zero_()
    model.b_out[0] = HELD_OUT.mean(dim=0)
    assert held_out_fvu(model, HELD_OUT, batch_tokens=300)[2] == pytest.approx(1, rel=1e-5)
    assert np.isnan(held_out_fvu(model, torch.ones(300, 24))[2])  # no variance to explain

"""Losses from outside, by name: pytorch-metric-learning's and a few that are written here."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import Tensor, nn

from dml import checkpoint, encoders, losses
from dml.config import Config, LossConfig
from dml.losses.loss import Loss
from dml.losses.outside import Outside
from dml.pairs import Pairs
from dml.state import Progress, State
from tests.contracts.loss_contract import DIM, LossContract, partners

PEER, HERE = "pytorch_metric_learning.losses", __name__


class MeanPull(nn.Module):
    """factor * the mean squared distance of positive pairs; a bare 0 without one."""

    def __init__(self, factor: float = 1.0, power: int = 2) -> None:
        super().__init__()
        self.factor, self.power = factor, power

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        first, second = torch.nonzero((labels[:, None] == labels).triu(1), as_tuple=True)
        if len(first) == 0:
            return torch.tensor(0.0)
        return self.factor * (embeddings[first] - embeddings[second]).norm(dim=1).pow(self.power).mean()


class OneWeightAClass(nn.Module):
    """Asks for both sizes, one of them by another library's name, and hands the rest on."""

    def __init__(self, num_classes: int, embedding_dim: int, dim: int = 1, **rest: Any) -> None:
        super().__init__(**rest)
        self.weight = nn.Parameter(torch.ones(num_classes, embedding_dim))
        self.dim = dim

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return (embeddings * self.weight[labels]).sum(self.dim).mean()


class Ours(Loss):
    def forward(self, pairs: Pairs) -> Tensor:
        return pairs.mean(pairs.rows.sum(), len(pairs.rows))


class NoScalar(nn.Module):
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.sum(1)


class NoTensor(nn.Module):
    def forward(self, embeddings: Tensor, labels: Tensor) -> dict[str, int]:
        return {"loss": 1}


NOT_A_CLASS = nn.Linear(2, 2)


def load(name: str, **options: float) -> Loss:
    return losses.from_config(LossConfig(name=name, options=options), num_classes=4, dim=DIM)


class TestOutside(LossContract):
    def make(self) -> nn.Module:
        return load(f"{HERE}:MeanPull", factor=0.5)

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        squares = [
            float((unit_ND[row] - unit_ND[p]).norm()) ** 2
            for row in range(len(labels_N))
            for p in partners(labels_N, row)[0]
        ]
        return 0.5 * sum(squares) / len(squares)

    def test_a_sample_that_is_in_the_batch_twice_is_no_pair_with_itself(self) -> None:
        """Here it is one: such a loss is called with embeddings and labels, which do not tell copies."""
        loss, ids = self.make().double(), torch.tensor([0, 0, 1, 2, 3])
        rows, known = self.batch([0, 0, 1, 1])
        told = loss(Pairs.of(rows[ids], known[ids], ids_B=ids))
        torch.testing.assert_close(told, loss(Pairs.of(rows[ids], known[ids])))


def batch() -> tuple[Tensor, Tensor]:
    rows = torch.randn(12, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.requires_grad_(), torch.arange(12) % 4


def test_a_pair_loss_of_pytorch_metric_learning_gives_its_value_and_gradient() -> None:
    ours, theirs = load(f"{PEER}:CircleLoss", m=0.3, gamma=40), peer.CircleLoss(m=0.3, gamma=40)
    found = []
    for call in (lambda x, labels: ours(Pairs.of(x, labels)), theirs):
        rows, labels = batch()
        value = call(rows, labels)
        value.backward()
        found.append((value.detach(), rows.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", ["ProxyNCALoss", "ArcFaceLoss", "CosFaceLoss", "SubCenterArcFaceLoss"])
def test_a_proxy_loss_of_pytorch_metric_learning_is_told_its_sizes_and_its_parameters_are_trained(name: str) -> None:
    """Some of them take num_classes and embedding_size only through *args or **kwargs of a parent."""
    loss = load(f"{PEER}:{name}")
    rows, labels = batch()
    before = loss(Pairs.of(rows.detach(), labels))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss(Pairs.of(rows.detach(), labels)).backward()
        optimizer.step()
    assert loss(Pairs.of(rows.detach(), labels)) < before


def test_every_loss_of_pytorch_metric_learning_that_takes_embeddings_and_labels_plugs_in() -> None:
    options = {
        "MarginLoss": {"learn_beta": 1, "num_classes": 4},
        "P2SGradLoss": {"descriptors_dim": DIM},
        "RankedListLoss": {"margin": 0.4, "Tn": 10},
    }
    # These wrap another loss, are abstract, or take no labels.
    others = {"BaseLossWrapper", "BaseMetricLossFunction", "CrossBatchMemory", "GenericPairLoss", "MultipleLosses"}
    others |= {
        "SelfSupervisedLoss",
        "VICRegLoss",
        "ManifoldLoss",
        "EmbeddingRegularizerMixin",
        "WeightRegularizerMixin",
    }
    names = {name for name, value in vars(peer).items() if isinstance(value, type)} - others
    assert len(names) >= 30
    for name in names:
        rows, labels = batch()
        loss = load(f"{PEER}:{name}", **options.get(name, {}))
        loss(Pairs.of(rows.float(), labels)).backward()
        assert torch.isfinite(rows.grad).all(), name


def test_sizes_are_given_where_they_are_asked_for_without_a_default() -> None:
    loss = load(f"{HERE}:OneWeightAClass")
    assert loss.module.weight.shape == (4, DIM)
    assert loss.module.dim == 1, "an optional dim means something else"


def test_what_is_set_wins_and_whole_numbers_are_int() -> None:
    loss = load(f"{HERE}:OneWeightAClass", num_classes=7.0, dim=-1.0)
    assert loss.module.weight.shape == (7, DIM)
    assert loss.module.dim == -1
    assert isinstance(loss.module.dim, int)


def test_a_loss_of_our_own_kind_is_called_with_pairs() -> None:
    loss = load(f"{HERE}:Ours")
    assert isinstance(loss, Ours)
    assert not isinstance(loss, Outside)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_package.at_all:Loss", {}, "cannot import no_such_package.at_all: ModuleNotFoundError: No module"),
        (f"{HERE}:MeanPul", {}, f"unknown class of {HERE} 'MeanPul'; valid: MeanPull, "),
        (f"{HERE}:Path", {}, "is no class of torch.nn.Module: <class 'pathlib.*Path'>"),
        (f"{HERE}:NOT_A_CLASS", {}, "is no class of torch.nn.Module: Linear"),
        (f"{HERE}:MeanPull", {"facto": 2}, r"refuses \(facto=2\): .*unexpected keyword.*; it takes factor, power"),
        (f"{PEER}:CircleLoss", {"gama": 2}, r"refuses \(gama=2\): .*; it takes m, gamma, "),
        (f"{PEER}:MultipleLosses", {}, "missing 1 required positional argument: 'losses'"),
        ("a package:Loss", {}, "is named package.module:Class, got 'a package:Loss'"),
        (":Loss", {}, "is named package.module:Class, got ':Loss'"),
        ("package:", {}, "is named package.module:Class, got 'package:'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **options)


@pytest.mark.parametrize("setting", [{"miner": "random"}, {"rho": 0.2}])
def test_settings_that_would_not_reach_it_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is from outside: loss\.miner and loss\.rho do not reach it"):
        losses.from_config(LossConfig(name=f"{HERE}:MeanPull", **setting), num_classes=4, dim=DIM)


def test_a_module_that_breaks_at_import_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_at_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="cannot import breaks_at_import: ZeroDivisionError: division by zero"):
        load("breaks_at_import:Loss")


@pytest.mark.parametrize(
    ("name", "message"),
    [("NoScalar", r"got a torch.float64 tensor \(12,\)"), ("NoTensor", "got {'loss': 1}")],
)
def test_what_returns_no_scalar_is_refused_in_words(name: str, message: str) -> None:
    rows, labels = batch()
    with pytest.raises(ValueError, match=f"{HERE}:{name} must return one floating-point number.*{message}"):
        load(f"{HERE}:{name}")(Pairs.of(rows, labels))


def test_a_checkpoint_never_imports_what_its_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must load on a machine without that package, and must not run a stranger's code."""
    (tmp_path / "strangers.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = Config().replace(**{"loss.name": "strangers:Loss"})
    encoder = encoders.build(config.encoder, channels=1, image_size=32)
    parts = {"encoder": encoder.state_dict(), "loss": nn.Linear(2, 2).state_dict()}
    state = State(config, Progress(step=1), parts)
    checkpoint.save(tmp_path / "made", encoder, config, info={}, state=state)
    loaded = checkpoint.load(tmp_path / "made")
    assert loaded.config.loss.name == "strangers:Loss"
    assert "strangers" not in sys.modules

"""Losses over learned proxies, each against its formula and against pytorch-metric-learning's."""

import math
from typing import ClassVar

import pytest
import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.regularizers import SparseCentersRegularizer
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from tests.contracts.loss_contract import CLASSES, DIM, LossContract


class ProxyContract(LossContract):
    """A loss of one proxy a class, whose value is the mean of `term(similarities to all proxies, own class)`."""

    name: ClassVar[str]
    options: ClassVar[dict[str, float]] = {}

    def make(self) -> nn.Module:
        torch.manual_seed(3)
        return losses.build(self.name, num_classes=CLASSES, dim=DIM, **self.options)

    def term(self, s: list[float], own: int) -> float:
        raise NotImplementedError

    def similarities(self, loss: nn.Module, unit_ND: Tensor) -> list[list[float]]:
        proxies = loss.proxies.detach().flatten(0, -2)
        proxies = proxies / proxies.norm(dim=1, keepdim=True)
        return [[float(row @ proxy) for proxy in proxies] for row in unit_ND]

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        rows = self.similarities(loss, unit_ND)
        return sum(self.term(s, own) for s, own in zip(rows, labels_N.tolist(), strict=True)) / len(rows)

    @pytest.mark.parametrize("sign", [1, -1], ids=["on its proxy", "opposite to it"])
    def test_an_embedding_on_the_axis_of_its_proxy_gives_finite_gradients(self, sign: int) -> None:
        loss = self.make()
        rows = (sign * loss.proxies.detach().view(CLASSES, -1, DIM)[:, 0]).requires_grad_()
        value = loss(Pairs.of(rows, torch.arange(CLASSES)))
        value.backward()
        assert torch.isfinite(value)
        for tensor in (rows, loss.proxies):
            assert torch.isfinite(tensor.grad).all()

    def test_length_of_the_proxies_does_not_matter(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        before = loss(Pairs.of(rows, known))
        with torch.no_grad():
            loss.proxies *= torch.rand_like(loss.proxies[..., :1]) + 0.5
        torch.testing.assert_close(loss(Pairs.of(rows, known)), before)

    def test_turning_embeddings_and_proxies_together_does_not_matter(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        turn = torch.linalg.qr(self.batch([0] * DIM, seed=5)[0].detach()).Q
        before = loss(Pairs.of(rows, known))
        with torch.no_grad():
            loss.proxies.copy_(loss.proxies @ turn)
        torch.testing.assert_close(loss(Pairs.of(rows @ turn, known)), before)

    def test_the_gradient_of_the_proxies_is_that_of_the_value(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 2, 2])
        pairs = Pairs.of(rows.detach(), known)

        def value(proxies: Tensor) -> Tensor:
            return torch.func.functional_call(loss, {"proxies": proxies}, (pairs,))

        assert torch.autograd.gradcheck(value, (loss.proxies,), eps=1e-7, atol=1e-4)


class TestNormalizedSoftmax(ProxyContract):
    name = "normalized_softmax"
    options: ClassVar = {"temperature": 0.2}

    def term(self, s: list[float], own: int) -> float:
        return -math.log(math.exp(s[own] / 0.2) / sum(math.exp(x / 0.2) for x in s))


class TestProxyNCA(ProxyContract):
    name = "proxy_nca"

    def term(self, s: list[float], own: int) -> float:
        distances = [2 - 2 * x for x in s]
        others = [math.exp(-9 * distance) for c, distance in enumerate(distances) if c != own]
        return -math.log(math.exp(-9 * distances[own]) / sum(others))


class TestProxyNCAPlusPlus(ProxyContract):
    name = "proxy_nca_pp"
    options: ClassVar = {"temperature": 0.25}

    def term(self, s: list[float], own: int) -> float:
        distances = [2 - 2 * x for x in s]
        return -math.log(math.exp(-4 * distances[own]) / sum(math.exp(-4 * distance) for distance in distances))

    def test_is_the_normalised_softmax_at_half_the_temperature(self) -> None:
        ours = self.make()
        other = losses.build("normalized_softmax", num_classes=CLASSES, dim=DIM, temperature=0.125)
        other.load_state_dict(ours.state_dict())
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        torch.testing.assert_close(ours(Pairs.of(rows, known)), other(Pairs.of(rows, known)))


class TestArcFace(ProxyContract):
    name = "arcface"

    def term(self, s: list[float], own: int) -> float:
        angle = math.acos(s[own])
        target = math.cos(angle + 0.5) if angle <= math.pi - 0.5 else math.cos(angle) - 0.5 * math.sin(0.5)
        logits = [16 * (target if c == own else x) for c, x in enumerate(s)]
        return -math.log(math.exp(logits[own]) / sum(math.exp(logit) for logit in logits))

    def test_moving_away_from_the_proxy_always_costs_more(self) -> None:
        """Beyond pi - margin cos(t + margin) rises again, so the loss would fall."""
        loss = losses.build("arcface", num_classes=3, dim=4).double()
        with torch.no_grad():
            loss.proxies.copy_(torch.eye(4)[:3])
            angles = torch.linspace(0.01, math.pi, 200, dtype=torch.float64)
            rows = torch.stack([angles.cos(), 0 * angles, 0 * angles, angles.sin()], dim=1)
            values = torch.stack([loss(Pairs.of(row[None], torch.tensor([0]))) for row in rows])
        assert (values.diff() > 0).all()


class TestCosFace(ProxyContract):
    name = "cosface"

    def term(self, s: list[float], own: int) -> float:
        logits = [16 * (x - 0.35 * (c == own)) for c, x in enumerate(s)]
        return -math.log(math.exp(logits[own]) / sum(math.exp(logit) for logit in logits))


class TestProxyAnchor(ProxyContract):
    name = "proxy_anchor"

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        rows, labels = self.similarities(loss, unit_ND), labels_N.tolist()
        pulls, pushes = [], []
        for c in range(CLASSES):
            mine = [s[c] for s, label in zip(rows, labels, strict=True) if label == c]
            rest = [s[c] for s, label in zip(rows, labels, strict=True) if label != c]
            if mine:
                pulls.append(math.log(1 + sum(math.exp(-32 * (x - 0.1)) for x in mine)))
            pushes.append(math.log(1 + sum(math.exp(32 * (x + 0.1)) for x in rest)))
        return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


class TestSoftTriple(ProxyContract):
    name = "soft_triple"
    options: ClassVar = {"centroids": 3, "margin": 0.05}

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        total = 0.0
        for s, own in zip(self.similarities(loss, unit_ND), labels_N.tolist(), strict=True):
            classes = []
            for c in range(CLASSES):
                mine = s[3 * c : 3 * c + 3]
                shares = [math.exp(x / 0.1) / sum(math.exp(y / 0.1) for y in mine) for x in mine]
                classes.append(sum(share * x for share, x in zip(shares, mine, strict=True)))
            logits = [20 * (x - 0.05 * (c == own)) for c, x in enumerate(classes)]
            total -= math.log(math.exp(logits[own]) / sum(math.exp(logit) for logit in logits))
        spread = 0.0
        for centroids in loss.proxies.detach():
            unit = centroids / centroids.norm(dim=1, keepdim=True)
            spread += sum(float((unit[a] - unit[b]).norm()) for a in range(3) for b in range(a + 1, 3))
        return total / len(labels_N) + 0.2 * spread / (CLASSES * 3 * 2)

    def test_one_centroid_is_cosface(self) -> None:
        one = losses.build("soft_triple", num_classes=CLASSES, dim=DIM, centroids=1, margin=0.1, scale=16)
        cosface = losses.build("cosface", num_classes=CLASSES, dim=DIM, margin=0.1, scale=16)
        with torch.no_grad():
            cosface.proxies.copy_(one.proxies[:, 0])
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        torch.testing.assert_close(one(Pairs.of(rows, known)), cosface(Pairs.of(rows, known)))

    def test_centroids_that_have_met_give_finite_gradients(self) -> None:
        loss = losses.build("soft_triple", num_classes=CLASSES, dim=DIM)
        with torch.no_grad():
            loss.proxies[:, 1] = loss.proxies[:, 0]
        rows, known = self.batch([0, 0, 1, 1])
        loss(Pairs.of(rows.float(), known)).backward()
        assert torch.isfinite(loss.proxies.grad).all()


PEERS = {
    "normalized_softmax": ({}, peer.NormalizedSoftmaxLoss, {}, lambda p: p.T),
    # Its denominator holds the own proxy, so it is Proxy-NCA++.
    "proxy_nca_pp": ({}, peer.ProxyNCALoss, {"softmax_scale": 9}, lambda p: p),
    "arcface": ({}, peer.ArcFaceLoss, {"margin": math.degrees(0.5), "scale": 16}, lambda p: p.T),
    "cosface": ({}, peer.CosFaceLoss, {"scale": 16}, lambda p: p.T),
    "proxy_anchor": ({}, peer.ProxyAnchorLoss, {}, lambda p: p),
    "soft_triple": (
        {"centroids": 3},
        peer.SoftTripleLoss,
        {
            "centers_per_class": 3,
            "weight_regularizer": SparseCentersRegularizer(CLASSES, 3),
            "weight_reg_weight": 0.2,
        },
        lambda p: p.flatten(0, 1).T,
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_agrees_with_pytorch_metric_learning(name: str) -> None:
    options, cls, their_options, theirs_of = PEERS[name]
    torch.manual_seed(0)
    ours = losses.build(name, num_classes=CLASSES, dim=DIM, **options).double()
    theirs = cls(num_classes=CLASSES, embedding_size=DIM, **their_options)
    (weights,) = theirs.parameters()
    weights.data = theirs_of(ours.proxies.detach()).clone()
    rows, labels = torch.randn(12, DIM, dtype=torch.float64), torch.arange(12) % 3
    found = []
    for call in (lambda x: ours(Pairs.of(x, labels)), lambda x: theirs(x, labels)):
        x = rows.clone().requires_grad_()
        value = call(x)
        value.backward()
        found.append((value.detach(), x.grad))
    weights_grad = theirs_of(ours.proxies.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights_grad, weights.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("normalized_softmax", {"temperature": 0}, "temperature must be above 0, got 0"),
        ("proxy_nca", {"temperature": -1}, "temperature must be above 0, got -1"),
        ("proxy_nca_pp", {"temperature": 0}, "temperature must be above 0"),
        ("arcface", {"margin": 28.6}, r"margin is an angle in radians in \[0, pi/2\], got 28.6"),
        ("arcface", {"scale": 0}, "scale must be above 0"),
        ("cosface", {"margin": 1.2}, r"margin is a cosine similarity in \[0, 1\], got 1.2"),
        ("cosface", {"scale": -1}, "scale must be above 0"),
        ("soft_triple", {"centroids": 2.5}, "centroids must be a whole number, at least 1, got 2.5"),
        ("soft_triple", {"gamma": 0}, "scale and gamma must be above 0, got 20 and 0"),
        ("soft_triple", {"margin": -0.1}, "margin is a cosine similarity"),
        ("soft_triple", {"weight": -1}, "weight must be at least 0, got -1"),
        ("proxy_anchor", {"margin": 1.5}, r"margin must be in \[0, 1\]"),
        ("proxy_anchor", {"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ],
)
def test_refuses_what_makes_no_sense(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.build(name, **{"num_classes": CLASSES, "dim": DIM} | options)

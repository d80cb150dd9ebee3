"""What a loss that sums over rows of the similarity matrix must satisfy too; it gives `make` and `row`."""

from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dml.memory import Memory
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract, partners

fuzz = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors]
)


class RowLossContract(LossContract):
    """Subclasses give the loss and the formula of one row."""

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        """Sum and number of the row's terms; s of the positives at pos, of the negatives at neg.

        `held` is s again, for what is a constant of the gradient.
        """
        raise NotImplementedError

    def mean(self, s_BN: Tensor, held_BN: Tensor, kinds: list[tuple[list[int], list[int]]]) -> float:
        rows = zip(s_BN.tolist(), held_BN.tolist(), kinds, strict=True)
        terms = [self.row(s, held, pos, neg) for s, held, (pos, neg) in rows]
        return sum(term for term, _ in terms) / max(sum(count for _, count in terms), 1)

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        s_NN = unit_ND.detach() @ unit_ND.detach().T
        return self.mean(s_NN, s_NN, [partners(labels_N, row) for row in range(len(labels_N))])

    def test_gradient_is_that_of_the_value(self) -> None:
        """Against central differences of the formula, with the loss's constants held."""
        loss = self.make().double()
        for labels in ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2, 1, 3]):
            rows, known = self.batch(labels)
            loss(Pairs.of(rows, known)).backward()
            kinds = [partners(known, row) for row in range(len(known))]
            start = (rows / rows.norm(dim=1, keepdim=True)).detach()
            expected = torch.zeros_like(rows)
            for place in range(rows.numel()):
                values = []
                for step in (1e-6, -1e-6):
                    moved = rows.detach().clone()
                    moved.view(-1)[place] += step
                    unit = moved / moved.norm(dim=1, keepdim=True)
                    values.append(self.mean(unit @ unit.T, start @ start.T, kinds))
                expected.view(-1)[place] = (values[0] - values[1]) / 2e-6
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(rows.grad, expected, rtol=1e-5, atol=1e-6)

    @fuzz
    @given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=12), seed=st.integers(0, 1000), tied=st.booleans())
    def test_equals_the_formula_on_any_classes_and_on_ties(self, labels: list[int], seed: int, tied: bool) -> None:
        rows, known = self.batch(labels, seed)
        if tied:
            rows = torch.eye(DIM, dtype=torch.float64)[torch.arange(len(labels)) % 3]
        self.check_formula(self.make().double(), rows, known)

    def test_turning_all_embeddings_together_does_not_matter(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 1, 2, 2, 2])
        turn, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2)).double())
        torch.testing.assert_close(loss(Pairs.of(rows, known)), loss(Pairs.of(rows @ turn, known)))

    def test_a_memory_is_further_columns_of_every_row(self) -> None:
        """Rows of the batch only, columns of both; stale copies and empty places of the memory take no part."""
        loss = self.make().double()
        assert loss.takes_memory
        (rows, known), (old, old_labels) = self.batch([0, 0, 1, 2]), self.batch([1, 0, 3, 2, 1], seed=7)
        old = (old / old.norm(dim=1, keepdim=True)).detach()
        memory = Memory(9, DIM).double()
        memory.add(old, old_labels, torch.tensor([10, 11, 2, 12, 13]))  # id 2 is the third of the batch
        pairs = Pairs.of(rows, known, ids_B=torch.arange(4), memory=memory).extended
        value = loss(pairs)
        value.backward()

        unit = (rows / rows.norm(dim=1, keepdim=True)).detach()
        kept = [0, 1, 3, 4]
        s = unit @ torch.cat([unit, old[kept]]).T
        labels = torch.cat([known, old_labels[kept]])
        torch.testing.assert_close(
            float(value.detach()), self.mean(s, s, [partners(labels, row) for row in range(4)]), rtol=1e-9, atol=1e-12
        )
        assert torch.isfinite(rows.grad).all()

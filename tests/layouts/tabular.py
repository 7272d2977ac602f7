"""Rows of tables: categories, experts, pairs, several tasks, and agents."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Arrays, Layout, normal, seeded

_SIZES = (4, 7, 3)


class _TabKANet(nn.Module):
    """Categories through a transformer, numbers through a KAN (AI-thpremed/TabKANet)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 8) for size in _SIZES)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm, self.numeric = nn.BatchNorm1d(5), KAN([5, 6, 16])
        self.head = KAN([8 * 5, 10, 2])

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        tokens = [embed(categories[:, i]) for i, embed in enumerate(self.embeddings)]
        numeric = self.numeric(self.norm(numbers)).view(-1, 2, 8)
        x = torch.cat([torch.stack(tokens, dim=1), numeric], dim=1)
        return self.head(self.encoder(x).flatten(1))


def tabkanet() -> nn.Module:
    return seeded(_TabKANet)


def _table(rng: np.random.Generator) -> Arrays:
    categories = np.stack([rng.integers(size, size=20) for size in _SIZES], axis=1)
    return {"categories": categories, "numbers": normal(rng, 20, 5)}


class _Offsets(nn.Module):
    """One table for all categories, with offsets, and a bucket of each number (FT-Transformer)."""

    offsets: Tensor
    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, 4, 11]), persistent=False)
        self.register_buffer("edges", torch.tensor([-1.0, 0.0, 1.0]))
        self.table, self.buckets = nn.Embedding(14, 3), nn.Embedding(4, 2)
        self.kan = KAN([3 * 3 + 2 * 2, 6, 1])

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        kinds = self.table(categories + self.offsets).flatten(1)
        numbers = torch.where(torch.isnan(numbers), torch.zeros_like(numbers), numbers)
        buckets = torch.bucketize(numbers[:, :2].contiguous(), self.edges)
        return self.kan(torch.cat([kinds, self.buckets(buckets).flatten(1)], dim=1)).view(-1)


def category_offsets() -> nn.Module:
    return seeded(_Offsets)


class _Recommender(nn.Module):
    """User and item embeddings, their product beside a KAN, a score of shape (N,) (KAN4Rec)."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(12, 6), nn.Embedding(20, 6)
        self.user_bias = nn.Embedding(12, 1)
        self.kan, self.out = KAN([12, 8, 4]), KANLinear(10, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u, i = self.users(user), self.items(item)
        deep = self.kan(torch.cat([u, i], dim=-1))
        score = self.out(torch.cat([u * i, deep], dim=-1)) + self.user_bias(user)
        return torch.sigmoid(score).squeeze(-1)


def recommender() -> nn.Module:
    return seeded(_Recommender)


class _DenseExperts(nn.Module):
    """Every expert runs, gates from topk scattered into zeros (waefrebeorn/Moe-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = KANLinear(6, 4), nn.ModuleList(KAN([6, 5, 3]) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(self.gate(x), 2, dim=-1)
        gates = torch.zeros(x.shape[0], 4).scatter(1, chosen, functional.softmax(scores, dim=-1))
        return sum((gates[:, i, None] * e(x) for i, e in enumerate(self.experts)), torch.zeros(1))


def dense_experts() -> nn.Module:
    return seeded(_DenseExperts)


class _SparseExperts(_DenseExperts):
    """Each expert takes only the rows that chose it, by torch.where (music transformers)."""

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(self.gate(x), 2, dim=-1)
        weights = functional.softmax(scores, dim=-1, dtype=torch.float)
        out = x.new_zeros(x.shape[0], 3)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            if row.shape[0] == 0:
                continue
            out[row] += weights[row, place].unsqueeze(1) * expert(x[row])
        return out


def sparse_experts() -> nn.Module:
    return seeded(_SparseExperts)


class _Siamese(nn.Module):
    """One tower for two inputs, cosine and distance (siamese KANs)."""

    def __init__(self, cdist: bool) -> None:
        super().__init__()
        self.cdist = cdist
        self.tower = nn.Sequential(KANLinear(8, 6), nn.LayerNorm(6), KANLinear(6, 4))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (functional.normalize(self.tower(x), dim=-1) for x in (left, right))
        if self.cdist:
            distance = torch.cdist(a[:, None], b[:, None]).view(-1, 1)
        else:
            distance = (a - b).pow(2).sum(-1, keepdim=True).sqrt()
        return functional.cosine_similarity(a, b), distance


def siamese() -> nn.Module:
    return seeded(lambda: _Siamese(cdist=True))


def siamese_written_out() -> nn.Module:
    """The distance in elementary operations."""
    return seeded(lambda: _Siamese(cdist=False))


class _TwoTowers(nn.Module):
    """All pairs of a batch are scored, (N, N), and one row alone is another shape (CLIP-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = KAN([8, 4]), KAN([5, 4])
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        a = functional.normalize(self.left(image), dim=-1)
        b = functional.normalize(self.right(text), dim=-1)
        return self.scale.exp() * a @ b.t()


class _Embeddings(_TwoTowers):
    """The two embeddings, of which a caller makes the pairs."""

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {
            "image_embedding": functional.normalize(self.left(image), dim=-1) * self.scale.exp(),
            "text_embedding": functional.normalize(self.right(text), dim=-1),
        }


def two_towers() -> nn.Module:
    return seeded(_TwoTowers)


def two_towers_embeddings() -> nn.Module:
    return seeded(_Embeddings)


def _pairs(rng: np.random.Generator) -> Arrays:
    return {"image": normal(rng, 16, 8), "text": normal(rng, 16, 5)}


class _MultiTask(nn.Module):
    """A trunk and a ModuleDict of heads, a dict of outputs, one of them None (multi-task KANs)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.trunk = KAN([7, 8, 6])
        self.heads = nn.ModuleDict({name: KANLinear(6, 3), "price": KANLinear(6, 1)})
        self.log_var = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        h = functional.selu(self.trunk(x))
        found: dict[str, Tensor | None] = {name: head(h) for name, head in self.heads.items()}
        return found | {"loss": None, "hidden": h}


def multi_task() -> nn.Module:
    """One head has a keyword of Python for its name."""
    return seeded(lambda: _MultiTask("class"))


def multi_task_renamed() -> nn.Module:
    return seeded(lambda: _MultiTask("class_"))


def _renamed(network: nn.Module) -> Any:
    """Rename what the refusal names in a state dict of `multi_task`."""
    state = multi_task().state_dict()
    return {key.replace("heads.class.", "heads.class_."): value for key, value in state.items()}


class Policy(NamedTuple):
    """What an actor-critic returns."""

    mean: Tensor
    std: Tensor
    value: Tensor


class _ContinuousActorCritic(nn.Module):
    """Mean, state-independent deviation and value, as a named tuple (KAN-Agents, kt-g/RL-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = KAN([5, 8, 2]), KAN([5, 8, 1])
        self.log_std = nn.Parameter(torch.zeros(1, 2) - 0.5)

    def forward(self, observation: Tensor) -> Policy:
        mean = torch.tanh(self.actor(observation))
        std = self.log_std.clamp(-20, 2).exp().expand_as(mean)
        return Policy(mean, std, self.critic(observation).squeeze(-1))


def continuous_actor_critic() -> nn.Module:
    return seeded(_ContinuousActorCritic)


class _DuelingQ(nn.Module):
    """Dueling Q-values after a shared KAN, the greedy action as an index (riiswa/kanrl)."""

    def __init__(self, greedy: str) -> None:
        super().__init__()
        self.greedy = greedy
        self.body, self.value, self.advantage = KANLinear(4, 8), KANLinear(8, 1), KANLinear(8, 3)

    def forward(self, state: Tensor) -> Any:
        h = functional.elu(self.body(state))
        advantage = self.advantage(h)
        q = self.value(h) + advantage - advantage.mean(dim=-1, keepdim=True)
        if self.greedy == "values":
            return q
        action = q.argmax(dim=-1)
        return q, action if self.greedy == "index" else action.float()


def dueling_q() -> nn.Module:
    return seeded(lambda: _DuelingQ("values"))


def greedy_actor() -> nn.Module:
    """Returns the index of the action, int64, beside the values."""
    return seeded(lambda: _DuelingQ("index"))


def greedy_actor_as_float() -> nn.Module:
    return seeded(lambda: _DuelingQ("float"))


class _TabNet(nn.Module):
    """Sparsemax by sort and cumsum, ghost features by step, KAN steps (TabNet-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = nn.ModuleList(KANLinear(6, 6) for _ in range(2))
        self.steps = nn.ModuleList(KANLinear(6, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    @staticmethod
    def sparsemax(x: Tensor) -> Tensor:
        ordered, _ = torch.sort(x, dim=-1, descending=True)
        places = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        sums = ordered.cumsum(-1)
        support = 1 + places * ordered > sums
        count = support.sum(-1, keepdim=True)
        threshold = (sums.gather(-1, count - 1) - 1) / count.to(x.dtype)
        return torch.clamp(x - threshold, min=0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prior, total, importance = torch.ones_like(x), torch.zeros(1), torch.zeros(1)
        for mask, step in zip(self.masks, self.steps, strict=True):
            chosen = self.sparsemax(mask(x) * prior)
            prior = prior * (1.3 - chosen)
            importance = importance + chosen
            total = total + functional.relu(step(x * chosen))
        return self.head(total), importance


def tabnet() -> nn.Module:
    return seeded(_TabNet)


class _Survival(nn.Module):
    """Hazards to a survival curve by cumprod, a where on a flag column (KAN survival models)."""

    def __init__(self, cumprod: bool) -> None:
        super().__init__()
        self.cumprod = cumprod
        self.treated, self.control = KAN([4, 6, 5]), KAN([4, 6, 5])

    def forward(self, x: Tensor) -> Tensor:
        flag, rest = x[:, :1] > 0, x[:, 1:]
        hazard = torch.where(flag, self.treated(rest), self.control(rest)).sigmoid()
        if self.cumprod:
            return torch.cumprod(1 - hazard, dim=1)
        return torch.log1p(-hazard).cumsum(dim=1).exp()


def survival() -> nn.Module:
    return seeded(lambda: _Survival(cumprod=True))


def survival_by_cumsum() -> nn.Module:
    """The same product as the exponential of a sum of logarithms."""
    return seeded(lambda: _Survival(cumprod=False))


LAYOUTS = (
    Layout(tabkanet, 4, samples=_table),
    Layout(category_offsets, 2, samples=_table),
    Layout(
        recommender,
        3,
        samples=lambda rng: {"user": rng.integers(12, size=20), "item": rng.integers(20, size=20)},
    ),
    Layout(dense_experts, 9, shape=6),
    Layout(
        sparse_experts,
        9,
        shape=6,
        refusal="no branch on values",
        remedy=Layout(dense_experts, 9, shape=6),
    ),
    Layout(
        siamese,
        2,
        shape={"left": 8, "right": 8},
        refusal="_cdist_forward",
        remedy=Layout(siamese_written_out, 2, shape={"left": 8, "right": 8}),
    ),
    Layout(
        two_towers,
        2,
        samples=_pairs,
        refusal="combine the rows after it is served",
        remedy=Layout(two_towers_embeddings, 2, samples=_pairs),
    ),
    Layout(
        multi_task,
        4,
        shape="x=7",
        refusal="heads.class: torch cannot trace what has a keyword of Python for its name",
        remedy=Layout(multi_task_renamed, 4, shape="x=7", save=_renamed),
    ),
    Layout(continuous_actor_critic, 4, shape="observation=5"),
    Layout(dueling_q, 3, shape=4),
    Layout(
        greedy_actor,
        3,
        shape=4,
        refusal="int64",
        remedy=Layout(greedy_actor_as_float, 3, shape=4),
    ),
    Layout(tabnet, 4, shape=6),
    Layout(
        survival,
        4,
        shape=5,
        refusal="prod",
        remedy=Layout(survival_by_cumsum, 4, shape=5),
    ),
)

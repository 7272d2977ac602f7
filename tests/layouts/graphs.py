"""Graphs with dense adjacency, point clouds and neighbours."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Arrays, Layout, normal, seeded

_NODES = 6


class _GCN(nn.Module):
    """Normalised dense adjacency, a KANLinear for each layer, mean readout (GKAN, GraphKAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin_in = nn.Linear(5, 8, bias=False)
        self.layers = nn.ModuleList(KANLinear(8, 8) for _ in range(2))
        self.lin_out = KANLinear(8, 3)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        adj = adj + torch.eye(adj.size(-1), device=adj.device)
        degree = adj.sum(-1).clamp(min=1e-6).pow(-0.5)
        adj = degree.unsqueeze(-1) * adj * degree.unsqueeze(-2)
        h = self.lin_in(x)
        for layer in self.layers:
            h = functional.dropout(torch.bmm(adj, layer(h)), p=0.5, training=self.training)
        return self.lin_out(h.mean(dim=1)).log_softmax(dim=-1)


def gcn() -> nn.Module:
    return seeded(_GCN)


def _graphs(rng: np.random.Generator) -> Arrays:
    adj = (rng.random((14, _NODES, _NODES)) < 0.4).astype(np.float32)
    return {"x": normal(rng, 14, _NODES, 5), "adj": np.maximum(adj, adj.transpose(0, 2, 1))}


class _OneGraph(nn.Module):
    """Node classification: the rows are the nodes of one graph (KANGNN)."""

    adj: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adj", torch.eye(_NODES).roll(1, 0) + torch.eye(_NODES))
        self.conv1, self.conv2 = KANLinear(5, 6), KANLinear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.adj @ self.conv2(self.adj @ self.conv1(x))


def one_graph() -> nn.Module:
    """Takes (nodes, features)."""
    return seeded(_OneGraph)


def one_graph_batched() -> nn.Module:
    """The same network on (batch, nodes, features), which a matrix product takes too."""
    return seeded(_OneGraph)


class _NodesByMean(nn.Module):
    """Rows of one graph that influence each other by a mean over all of them, at any count."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.dim = 1 if batched else 0
        self.conv1, self.conv2 = KANLinear(5, 6), KANLinear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        everyone = h.mean(self.dim, keepdim=True).expand_as(h)
        return self.conv2(torch.cat([h, everyone], dim=-1))


def node_mean() -> nn.Module:
    return seeded(lambda: _NodesByMean(batched=False))


def node_mean_batched() -> nn.Module:
    return seeded(lambda: _NodesByMean(batched=True))


class _GAT(nn.Module):
    """Additive attention over edges of a dense mask, KAN features (KAGAT, GATKAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = KANLinear(5, 8), KANLinear(8, 2)
        self.a = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        h = self.w(x)
        e = functional.leaky_relu((h @ self.a[0]).unsqueeze(2) + (h @ self.a[1]).unsqueeze(1), 0.2)
        mask = (adj > 0) | torch.eye(adj.shape[1], dtype=torch.bool)
        attention = torch.where(mask, e, -9e15 * torch.ones_like(e)).softmax(dim=2)
        return self.out(functional.elu(attention @ h))


def gat() -> nn.Module:
    return seeded(_GAT)


class _PointNet(nn.Module):
    """Shared KANs over points, a small T-Net, max over points (PointNet_KAN_Graphic)."""

    def __init__(self) -> None:
        super().__init__()
        self.tnet, self.fc = KAN([3, 6]), nn.Linear(6, 9)
        self.local, self.bn = KANLinear(3, 8), nn.BatchNorm1d(8)
        self.shared, self.head = KANLinear(8, 10), KAN([10, 6, 4])

    def forward(self, points: Tensor) -> Tensor:
        pooled = torch.max(self.tnet(points.transpose(1, 2)), 1)[0]
        turn = self.fc(pooled).view(-1, 3, 3) + torch.eye(3).repeat(points.size(0), 1, 1)
        x = torch.bmm(points.transpose(1, 2), turn)
        x = self.bn(self.local(x).transpose(2, 1)).transpose(2, 1)
        x = torch.max(self.shared(x), dim=1, keepdim=True).values
        return self.head(x.view(-1, 10))


def pointnet() -> nn.Module:
    return seeded(_PointNet)


class _DGCNN(nn.Module):
    """k nearest neighbours by topk, gathered, KAN over edges (said-ohamouddou/KANdgcnn)."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.head = KANLinear(6, 8), KANLinear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, dims, points = x.shape
        inner = -2 * torch.matmul(x.transpose(2, 1), x)
        square = torch.sum(x**2, dim=1, keepdim=True)
        nearest = (-square - inner - square.transpose(2, 1)).topk(k=3, dim=-1)[1]
        base = torch.arange(0, batch, device=x.device).view(-1, 1, 1) * points
        flat = (nearest + base).view(-1)
        x = x.transpose(2, 1).contiguous()
        feature = x.view(batch * points, -1)[flat, :].view(batch, points, 3, dims)
        x = x.view(batch, points, 1, dims).repeat(1, 1, 3, 1)
        h = self.edge(torch.cat((feature - x, x), dim=3)).max(dim=2)[0]
        return self.head(torch.cat([h.max(dim=1)[0], h.mean(dim=1)], dim=1))


def dgcnn() -> nn.Module:
    return seeded(_DGCNN)


class _MessagePassing(nn.Module):
    """An edge list instead of an adjacency: index_add over the nodes of one graph (KA-GNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = KANLinear(8, 6), KANLinear(10, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index[0], edge_index[1]
        messages = self.message(torch.cat([x[source], x[target]], dim=-1))
        summed = torch.zeros(x.size(0), 6).index_add(0, target, messages)
        return self.update(torch.cat([x, summed], dim=-1))


class _BatchedMessagePassing(_MessagePassing):
    """(batch, nodes, features) and (batch, 2, edges): gather and scatter_add along the nodes."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index.unbind(1)
        width = x.shape[-1]
        ends = [torch.gather(x, 1, i.unsqueeze(-1).expand(-1, -1, width)) for i in (source, target)]
        messages = self.message(torch.cat(ends, dim=-1))
        place = target.unsqueeze(-1).expand_as(messages)
        summed = torch.zeros(*x.shape[:2], 6).scatter_add(1, place, messages)
        return self.update(torch.cat([x, summed], dim=-1))


def message_passing() -> nn.Module:
    return seeded(_MessagePassing)


def message_passing_batched() -> nn.Module:
    return seeded(_BatchedMessagePassing)


def _edges(batched: bool) -> object:
    leading = (12,) if batched else ()
    return lambda rng: {
        "x": normal(rng, *leading, _NODES, 4),
        "edge_index": rng.integers(_NODES, size=(*leading, 2, 9)),
    }


LAYOUTS = (
    Layout(gcn, 3, samples=_graphs),
    Layout(
        one_graph,
        2,
        samples=lambda rng: {"x": normal(rng, _NODES, 5)},
        refusal="does not take",
        remedy=Layout(one_graph_batched, 2, samples=lambda rng: {"x": normal(rng, 9, _NODES, 5)}),
    ),
    Layout(
        node_mean,
        2,
        shape=5,
        refusal="influence each other",
        remedy=Layout(node_mean_batched, 2, shape=(_NODES, 5)),
    ),
    Layout(gat, 2, samples=_graphs),
    Layout(pointnet, 5, shape=(3, 10)),
    Layout(dgcnn, 2, samples=lambda rng: {"x": normal(rng, 12, 3, 8)}),
    Layout(
        message_passing,
        2,
        samples=_edges(batched=False),  # type: ignore[arg-type]
        refusal="rows",
        remedy=Layout(
            message_passing_batched,
            2,
            samples=_edges(batched=True),  # type: ignore[arg-type]
        ),
    ),
)

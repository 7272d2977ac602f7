"""Readable names for a graph: after the modules of the network that its nodes come from.

What a module returns is named after the module (`layers.0/basis`), what it computes on the way
after the module and the operator (`layers.0/basis/sub_3`). Weights keep the names they have in the
network (`layers.0.weight`); other constants are `constants/0` and so on.
"""

import ast
from collections import defaultdict

import onnx_ir

_WRAPPER = "module"  # where `Call` holds the network
_SCOPES = "pkg.torch.onnx.name_scopes"  # a list of paths, the innermost last, then the node itself
_UNNAMED = "lifted_tensor_"  # what torch.export calls a tensor that forward makes

Scope = tuple[str, ...]


def name_after_modules(model: onnx_ir.Model, outputs: int) -> None:
    """Rename the nodes, values and initializers of a graph that torch.onnx.export made.

    The names of inputs and outputs stay, and those inside branches and loops. The exporter's notes
    on the nodes are needed.

    Args:
        model: To be changed.
        outputs: How many of its outputs, from the first on, are the network's. What leads to
            others is no result of the modules that it lies in.
    """
    graph = model.graph
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    for node in graph.all_nodes():
        if node.graph is not graph:
            taken |= {node.name, *(value.name for value in (*node.inputs, *node.outputs) if value)}

    def unique(name: str) -> str:
        found, count = name, 0
        while found in taken:
            count += 1
            found = f"{name}_{count}"
        taken.add(found)
        return found

    constants, names = 0, {}
    for i, (name, value) in enumerate(list(graph.initializers.items())):
        path = name.removeprefix(f"{_WRAPPER}.")
        if path == name or _UNNAMED in name:
            path, constants = f"constants/{constants}", constants + 1
        names[f"\0{i}"] = unique(path)
        value.name = f"\0{i}"  # out of the way: no two may share a name meanwhile
    for meanwhile, name in names.items():
        graph.initializers[meanwhile].name = name

    kept = {id(value) for value in graph.outputs}
    exits = _exits(graph, outputs)
    for node in graph:
        scope = _scope(node)
        name = unique("/".join((*scope, node.op_type.lower())))
        for depth in range(1, len(scope) + 1):
            if exits[scope[:depth]] == [node.outputs[0]]:
                taken.discard(name)
                name = unique("/".join(scope[:depth]))
                break
        node.name = name
        for i, value in enumerate(node.outputs):
            if id(value) not in kept:
                value.name = unique(f"{name}/{i}") if i else name


def _exits(graph: onnx_ir.Graph, outputs: int) -> dict[Scope, list[onnx_ir.Value]]:
    """Find the values that each module gives to nodes outside it."""
    results = {id(value) for value in graph.outputs[:outputs]}
    exits: dict[Scope, list[onnx_ir.Value]] = defaultdict(list)
    for node in graph:
        scope = _scope(node)
        for value in node.outputs:
            users = [_scope(user) for user, _ in value.uses()]
            for depth in range(1, len(scope) + 1):
                inner = scope[:depth]
                if id(value) in results or any(user[:depth] != inner for user in users):
                    exits[inner].append(value)
    return exits


def _scope(node: onnx_ir.Node) -> Scope:
    """Name the modules a node lies in, from the outermost, each relative to the one before."""
    paths = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]
    scope, outer = [], f"{_WRAPPER}."
    for path in paths:
        if path.startswith(outer):
            scope.append(path.removeprefix(outer))
            outer = f"{path}."
    return tuple(scope)

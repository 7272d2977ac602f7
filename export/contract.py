"""What a bundle says about itself: the manifest, and the notes inside its files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata

import torch

import kan_ops
from export.conversion.lowering import Choice, can_be_operator
from export.network import Network
from export.proof.check import Checked
from export.proof.parity import Measurement
from export.proof.tolerance import RELATIVE_TOLERANCE
from kan_bundle import __version__
from kan_bundle.layout import BundleFolder
from kan_bundle.manifest import (
    FORMAT,
    FileRecord,
    InputRange,
    LayerRecord,
    Manifest,
    ParityRecord,
    Precision,
    PruningRecord,
    Source,
)
from kan_model.activations import activation_name
from kan_model.splines import is_uniform


def make_manifest(
    folder: BundleFolder,
    source: Source | None,
    network: Network,
    layers: tuple[LayerRecord, ...],
    precision: Precision,
    pruning: PruningRecord | None,
    checked: Checked,
    files: Mapping[str, FileRecord],
) -> Manifest:
    """Write down what was exported, and how far each runtime was from the reference."""
    return Manifest(
        format=FORMAT,
        name=folder.name,
        version=folder.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source,
        layers=layers,
        precision=precision,
        input_range=_input_range(network),
        inputs=network.inputs.specs,
        outputs=network.outputs,
        reference=checked.reference.precision,
        files=dict(files),
        parity=tuple(_parity_record(m) for m in checked.measured),
        versions=_versions(),
        pruning=pruning,
        lossy_operators=checked.lossy,
    )


def describe_layers(
    network: Network, choices: Mapping[str, Choice], precision: Precision, *, inline: bool
) -> tuple[LayerRecord, ...]:
    """Describe every KANLinear, in the network's order, and how the file computes it."""
    return tuple(
        LayerRecord(
            name=name,
            in_features=layer.in_features,
            out_features=layer.out_features,
            grid_size=layer.grid_size,
            spline_order=layer.spline_order,
            grid="uniform" if bool(is_uniform(layer.grid).all()) else "adapted",
            standalone_scaler=layer.enable_standalone_scale_spline,
            base_activation=activation_name(layer.base_activation),
            lowering=choices[name].form,
            lowering_error=choices[name].error,
            eager_error=choices[name].eager_error,
            operator=(
                kan_ops.OPERATOR if not inline and can_be_operator(layer, precision) else None
            ),
        )
        for name, layer in network.layers.items()
    )


def metadata_props(
    name: str,
    source: Source | None,
    layers: Sequence[LayerRecord],
    pruning: PruningRecord | None = None,
) -> Mapping[str, str]:
    """Say in a file itself what it is and where it comes from."""
    notes = {
        "kanserve.version": __version__,
        "kanserve.model": name,
        "kanserve.layers": json.dumps([asdict(layer) for layer in layers]),
    }
    if source is not None:
        notes |= {"kanserve.source": source.file, "kanserve.source_sha256": source.sha256}
    if pruning is not None:
        notes |= {"kanserve.pruning": json.dumps(asdict(pruning))}
    return notes


def _parity_record(m: Measurement) -> ParityRecord:
    return ParityRecord(
        runtime=m.runtime,
        max_absolute=m.max_absolute,
        max_relative=m.max_relative,
        max_ulp=m.max_ulp,
        tolerance=RELATIVE_TOLERANCE,
        excess=m.excess,
        probes=m.rows,
        same_argmax=m.same_argmax,
    )


def _input_range(network: Network) -> InputRange | None:
    if network.leading is None:
        return None
    layer = network.layers[network.leading]
    k = layer.spline_order
    return InputRange(
        low=tuple(layer.grid[:, k].tolist()),
        high=tuple(layer.grid[:, k + layer.grid_size].tolist()),
    )


def _versions() -> dict[str, str]:
    found = {"kanserve": __version__, "torch": torch.__version__}
    for package in ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

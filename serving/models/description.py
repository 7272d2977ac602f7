"""What the protocol tells of a model, and how large its messages may be."""

from collections.abc import Sequence

from kan_bundle.layout import MODEL_FILE
from kan_bundle.manifest import Datatype, Manifest, PruningRecord, TensorSpec
from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from serving.models.loading import LoadedModel
from serving.tensors import row_bytes

_PLATFORM = "onnxruntime_onnx"

_DATA_TYPES: dict[Datatype, config_pb.DataType] = {
    "FP32": config_pb.TYPE_FP32,
    "INT64": config_pb.TYPE_INT64,
    "INT32": config_pb.TYPE_INT32,
    "UINT8": config_pb.TYPE_UINT8,
    "BOOL": config_pb.TYPE_BOOL,
}
_ENVELOPE_BYTES = 1024  # of a request beside its tensors: names, shape, id
_LEAST_MESSAGE_BYTES = 64 * 2**20
_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's
_ROWS_THAT_FIT = 64


def model_metadata(model: LoadedModel, served: Sequence[int]) -> pb.ModelMetadataResponse:
    """Tell a model's versions and tensors.

    Args:
        model: The version asked for.
        served: Numbers of all versions that are served.
    """
    manifest = model.manifest
    return pb.ModelMetadataResponse(
        name=manifest.name,
        versions=[str(version) for version in served],
        platform=_PLATFORM,
        inputs=[_tensor_metadata(spec) for spec in manifest.inputs],
        outputs=[_tensor_metadata(spec) for spec in manifest.outputs],
        properties=_properties(model),
    )


def model_config(model: LoadedModel, max_message_bytes: int) -> config_pb.ModelConfig:
    """Tell a model's configuration in Triton's terms.

    Args:
        model: The version asked for.
        max_message_bytes: Largest request accepted, from which the limit for a batch follows.
    """
    manifest, limits = model.manifest, model.lane.limits
    config = config_pb.ModelConfig(
        name=manifest.name,
        platform=_PLATFORM,
        backend="onnxruntime",
        max_batch_size=max(1, fitting_rows(manifest, max_message_bytes)),
        default_model_filename=MODEL_FILE,
    )
    if limits.max_wait_s:
        config.dynamic_batching.max_queue_delay_microseconds = round(limits.max_wait_s * 1e6)
    for tensors, specs in ((config.input, manifest.inputs), (config.output, manifest.outputs)):
        for spec in specs:
            dims = spec.shape[1:]
            tensor = tensors.add(
                name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=dims or (1,)
            )
            if not dims:  # Triton wants at least one, and takes it away again
                tensor.reshape.SetInParent()
    return config


def fitting_message_bytes(models: Sequence[Manifest]) -> int:
    """Choose a limit for requests that leaves room for a batch of the model with the largest rows.

    gRPC's own default, 4 MiB, is less than seven images of 3 x 224 x 224.
    """
    largest_row = max((_row_bytes(manifest) for manifest in models), default=0)
    wanted = _ROWS_THAT_FIT * largest_row + _ENVELOPE_BYTES
    return min(max(_LEAST_MESSAGE_BYTES, wanted), _LARGEST_MESSAGE_BYTES)


def fitting_rows(manifest: Manifest, max_message_bytes: int) -> int:
    """Count the rows of a model that a request of so many bytes can have."""
    return (max_message_bytes - _ENVELOPE_BYTES) // _row_bytes(manifest)


def _row_bytes(manifest: Manifest) -> int:
    return sum(row_bytes(spec) for spec in manifest.inputs)


def _properties(model: LoadedModel) -> dict[str, str]:
    """Tell where a model comes from, and how it runs."""
    manifest = model.manifest
    activations = sorted({layer.base_activation for layer in manifest.layers})
    return {
        "version": str(manifest.version),
        "model_sha256": manifest.files[MODEL_FILE].sha256,
        "source_sha256": manifest.source.sha256 if manifest.source else "",
        "base_activation": ", ".join(activations),
        "kan_layers": str(len(manifest.layers)),
        "fused_layers": str(model.engine.fused_layers),
        "nodes": ", ".join(f"{count} {name}" for name, count in model.engine.placement.items()),
        **_pruning(manifest.pruning),
        **(model.value_rules.properties() if model.value_rules else {}),
    }


def _pruning(record: PruningRecord | None) -> dict[str, str]:
    """Tell whether a model is another function than its source."""
    if record is None:
        return {"prune_threshold": "", "pruned_edges": ""}
    return {
        "prune_threshold": str(record.threshold),
        "pruned_edges": f"{record.zeroed} of {record.edges}",
    }


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )

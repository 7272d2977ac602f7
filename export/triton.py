"""config.pbtxt: what the Triton Inference Server needs to serve a model's folder as it is."""

from collections.abc import Sequence

from kan_bundle.layout import MODEL_FILE
from kan_bundle.manifest import TensorSpec

MAX_BATCH_SIZE = 1024
"""Rows Triton may put into one batch. It wants a limit; the model itself has none."""


def render_config(name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Write a model's configuration in protobuf text format.

    Args:
        name: Model name.
        inputs: Input tensors, batch first.
        outputs: Output tensors, batch first.
    """
    return "\n".join(
        [
            f'name: "{name}"',
            'platform: "onnxruntime_onnx"',
            f"max_batch_size: {MAX_BATCH_SIZE}",
            f'default_model_filename: "{MODEL_FILE}"',
            *(_tensor("input", spec) for spec in inputs),
            *(_tensor("output", spec) for spec in outputs),
            "dynamic_batching { }",
            "",
        ]
    )


def _tensor(field: str, spec: TensorSpec) -> str:
    """Write one tensor. Triton wants a size: one number a row has the shape (rows, 1) there."""
    sizes = spec.shape[1:]
    dims = ", ".join(str(size) for size in sizes or (1,))
    reshape = "" if sizes else "  reshape { shape: [ ] }\n"
    return (
        f"{field} {{\n"
        f'  name: "{spec.name}"\n'
        f"  data_type: TYPE_{spec.datatype}\n"
        f"  dims: [ {dims} ]\n"
        f"{reshape}"
        "}"
    )

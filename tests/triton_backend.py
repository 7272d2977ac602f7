"""Triton's backend `onnxruntime`, in Python, for a Triton that comes without NVIDIA's own.

Triton calls it for models that name that backend, as our config.pbtxt does, and hands it requests
that its front has read, checked and queued. It runs in the environment of nvidia-pytriton.
"""

import json
from pathlib import Path
from typing import Any

import onnxruntime


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the file that the configuration names."""
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        version = Path(args["model_repository"]) / args["model_version"]
        self._session = onnxruntime.InferenceSession(version / config["default_model_filename"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, each by itself."""
        import triton_python_backend_utils as triton  # only there when Triton runs this

        answers = []
        for request in requests:
            feed = {
                name: triton.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            found = self._session.run(self._outputs, feed)
            tensors = [triton.Tensor(*pair) for pair in zip(self._outputs, found, strict=True)]
            answers.append(triton.InferenceResponse(tensors))
        return answers

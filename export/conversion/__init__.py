"""From a network to files: its KANLinear layers in a form to export, then ONNX and TorchScript."""

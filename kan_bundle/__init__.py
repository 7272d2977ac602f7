"""The bundle: the folder that `export` writes and `serving` reads, and the one thing they share.

This package imports neither torch, onnxruntime nor grpc, and nothing else of the project.
"""

__version__ = "0.1.0"

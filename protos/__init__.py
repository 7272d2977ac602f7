"""The Open Inference Protocol over gRPC: the .proto files and the modules generated from them.

The generated modules are committed, so a clone runs without a generator. After a change to a .proto
file run `make protos`; a test compares the committed modules with freshly generated ones.
"""

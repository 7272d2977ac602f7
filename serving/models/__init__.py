"""A model's way: from a folder of the repository, chosen and verified, to what is served now.

This package knows no gRPC.
"""

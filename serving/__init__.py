"""From a bundle to answers over gRPC. Nothing in this package imports torch."""

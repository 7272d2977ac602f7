"""Handwritten digits: train, export, serve, classify."""

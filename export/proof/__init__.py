"""Proof that what was written computes what the network computes: docs/proof.md says how."""

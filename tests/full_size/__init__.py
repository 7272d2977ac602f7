"""Tests that take gigabytes and minutes; `make test-full-size` runs them, `make test` does not."""

"""Complete uses of kanserve on real data."""

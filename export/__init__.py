"""From a trained checkpoint to a verified bundle."""

"""VGG16 with a KAN for its head: 2.3 GB of weights, of which 2.2 GB are three KANLinear layers."""

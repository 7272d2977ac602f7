"""Faults under load: three servers, behind each balancer, and what their clients see of it."""

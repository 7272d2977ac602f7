"""Tests that build and run the images; `make test-container` runs them, `make test` does not.

They run as root, with Debian's buildah, podman, runc, netavark, aardvark-dns, iptables, catatonit
and debootstrap.
"""

#!/bin/sh
# Commit a Debian with Python under the name of a base image, where no registry can be reached.
#
#   stand_in.sh IMAGE [PACKAGE...]
#
# The real image has Python's own modules without bytecode, so this one has too. It needs root,
# debootstrap and buildah, and takes a minute.
set -eu

image=$1
shift
packages=$(echo python3 python3-venv ca-certificates "$@" | tr ' ' ,)
folder=$(mktemp --directory)
container=
trap 'test -z "$container" || buildah rm "$container" >/dev/null; rm -rf "$folder"' EXIT

debootstrap --variant=minbase --include="$packages" bookworm "$folder" >&2
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
find "$folder/usr/lib" -name '__pycache__' -type d -prune -exec rm -rf {} +

container=$(buildah from scratch)
buildah add --quiet "$container" "$folder" / >&2
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet "$container" "$image" >&2

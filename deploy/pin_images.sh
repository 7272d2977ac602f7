#!/bin/sh
# Pin the images that files name by the digests that their tags have now:
#   sh deploy/pin_images.sh Dockerfile deploy/compose.yaml
# It asks the registries, so it runs where they are reached, with skopeo. Run again, it renews.
set -eu

images() { grep -hoE 'docker\.io/[a-z0-9./_-]+:[A-Za-z0-9._-]+' "$@" | sort -u; }

command -v skopeo >/dev/null || {
    echo "expected skopeo, which asks registries for digests, found none; install it" >&2
    exit 1
}
script=""
for image in $(images "$@"); do
    # Of an image for several platforms, the digest of the list of all of them.
    digest=$(skopeo inspect --no-tags --format '{{.Digest}}' "docker://$image") || {
        echo "$image: its registry gave no digest; nothing was changed" >&2
        exit 1
    }
    echo "$digest" | grep -qxE 'sha256:[0-9a-f]{64}' || {
        echo "$image: expected a digest, found '$digest'; nothing was changed" >&2
        exit 1
    }
    escaped=$(echo "$image" | sed 's/\./\\./g')
    script="$script
s#$escaped(@sha256:[0-9a-f]{64})?([^A-Za-z0-9._@-]|\$)#$image@$digest\2#"
    echo "$image $digest"
done
sed -i -E "$script" "$@"

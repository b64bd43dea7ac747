#!/bin/sh
# Render a report page as a picture: docs/picture.sh REPORT.html PICTURE.png [WIDTH HEIGHT]; needs Debian's chromium.
set -eu
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
    --user-data-dir="$profile" --window-size="${3:-1060},${4:-1600}" --screenshot="$(realpath "$2")" \
    "file://$(realpath "$1")" 2>"$profile/log" || { cat "$profile/log" >&2; exit 1; }

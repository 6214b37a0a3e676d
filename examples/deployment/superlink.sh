#!/bin/sh
# The server: ./superlink.sh [HOST] [PORT]
#
# Everything on one port, with TLS. Only nodes whose keys were registered may take part. Whoever
# reaches the port may start runs: see "Who may reach what" in README.md before HOST is anything
# but 127.0.0.1.
set -eu
KEYS=${KEYS:-keys}
export FLWR_TELEMETRY_ENABLED=0

exec flower-superlink \
  --host "${1:-127.0.0.1}" --port "${2:-9443}" \
  --ssl-ca-certfile "$KEYS/ca.crt" \
  --ssl-certfile "$KEYS/server.crt" \
  --ssl-keyfile "$KEYS/server.key" \
  --enable-supernode-auth \
  --disable-runtime-dependency-installation \
  --database superlink.db

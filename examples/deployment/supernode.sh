#!/bin/sh
# One organisation's node: ./supernode.sh NAME ROWS [SUPERLINK] [PORT]
#
#   NAME       of this client; its private key is keys/nodes/NAME
#   ROWS       file, glob or folder that stays here
#   SUPERLINK  host:port of the server
#   PORT       on this machine, for the node's own processes; on 127.0.0.1, one for each node
set -eu
KEYS=${KEYS:-keys}
STATE=${STATE:-$PWD/state}
case $2 in /*) ROWS=$2 ;; *) ROWS=$PWD/$2 ;; esac
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

exec flower-supernode \
  --superlink "${3:-127.0.0.1:9443}" \
  --root-certificates "$KEYS/ca.crt" \
  --auth-supernode-private-key "$KEYS/nodes/$1" \
  --port "${4:-9094}" \
  --node-config "name=\"$1\" data=\"$ROWS\" state-dir=\"$STATE\""

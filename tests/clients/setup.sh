#!/usr/bin/env bash
# Installs the client libraries that tests/tests/clients.rs runs, and what validates manifests, into the folder given (kept between runs).
set -euo pipefail
folder="$1"
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$folder"
if ! "$folder/python/bin/python" -c 'import openai' 2>/dev/null; then
    python3 -m venv "$folder/python"
    "$folder/python/bin/pip" install -q "openai>=2,<4"
fi
# For tests/tests/manifests.rs.
if ! "$folder/python/bin/python" -c 'import kubernetes_validate, jsonschema, yaml' 2>/dev/null; then
    "$folder/python/bin/pip" install -q "kubernetes-validate==1.37.0" "jsonschema>=4,<5" "pyyaml>=6,<7"
fi
if ! [ -d "$folder/node_modules/openai" ]; then
    (cd "$folder" && npm install --silent --no-audit --no-fund "openai@>=6")
fi
cp "$here"/*.py "$here"/*.mjs "$folder"

#!/usr/bin/env bash
# Installs the client libraries that tests/tests/clients.rs runs, into the folder given (kept between runs).
set -euo pipefail
folder="$1"
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$folder"
if ! "$folder/python/bin/python" -c 'import openai' 2>/dev/null; then
    python3 -m venv "$folder/python"
    "$folder/python/bin/pip" install -q "openai>=2,<4"
fi
if ! [ -d "$folder/node_modules/openai" ]; then
    (cd "$folder" && npm install --silent --no-audit --no-fund "openai@>=6")
fi
cp "$here"/*.py "$here"/*.mjs "$folder"

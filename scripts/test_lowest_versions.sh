#!/usr/bin/env bash
# Runs a part of the tests in the environment VENV-lowest, which scripts/lowest_env.sh makes.
# Usage: scripts/test_lowest_versions.sh VENV [PYTEST FLAGS].
set -euo pipefail
cd "$(dirname "$0")/.."
lowest=$1-lowest
shift

export PYTHONPATH="$PWD/python"  # for the processes that the tests start, too
export FUZZ_EXAMPLES=10  # make test asks for more
"$lowest/bin/python" -m pytest -q -m "not slow" -p no:cacheprovider --ignore test/integration/http_api/test_docs_page.py "$@" \
    test/integration/http_api test/integration/modelexpress/test_service.py \
    test/integration/modelexpress/test_server_process.py test/unit/entrypoints test/unit/modelexpress \
    test/unit/test_grammar.py test/unit/test_http_client.py test/unit/model_loader/test_seed_transfer.py \
    test/unit/test_detokenizer.py test/unit/test_tokenizer_manager.py test/unit/test_hub_and_cli.py

#!/bin/sh
# Finds a Python (PYTHON overrides it) and hands over to run_tests.py.
cd "$(dirname "$0")" || exit 1
for python in "$PYTHON" python3 python; do
  if [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 &&
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    exec "$python" run_tests.py "$@"
  fi
done
echo "error: no Python 3.10 or newer found; install one, or set PYTHON to it" >&2
exit 1

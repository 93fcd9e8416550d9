#!/usr/bin/env bash
# Run the tests; options go to pytest: bash run_tests.sh tests/utils/test_metrics.py -k fraction
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
needed="pytest pytest-timeout pytest-xdist scikit-learn scipy"
source "$root/utils/env.sh"
cd "$root"
export OMP_NUM_THREADS=1
"$PYTHON" -c "import trl" 2> /dev/null || echo "tests: TRL's trainers are NOT tested: pip install trl" >&2
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"

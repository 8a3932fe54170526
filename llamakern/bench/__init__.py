"""Benchmarks, honest in every number: `llamakern bench`, and the scripts of benchmarks/ in a checkout.

Each case races an op against the best that others offer, in one process, and a row with an error has checked ours in
the same run. What the machine could do at most is measured between the turns. How to read a line: docs/benchmarks.md.
"""

from llamakern.bench.cases import DTYPES as DTYPES
from llamakern.bench.cases import MATMUL_DTYPES as MATMUL_DTYPES
from llamakern.bench.cases import ROOMS as ROOMS
from llamakern.bench.clock import Rotating as Rotating
from llamakern.bench.clock import race as race
from llamakern.bench.clock import relative_error as relative_error
from llamakern.bench.table import Table as Table
from llamakern.bench.table import add_arguments as add_arguments
from llamakern.bench.table import machine as machine

"""The clock and the table of `llamakern.bench`, by a short name for the scripts beside this file."""

from llamakern.bench import DTYPES as DTYPES
from llamakern.bench import MATMUL_DTYPES as MATMUL_DTYPES
from llamakern.bench import Rotating as Rotating
from llamakern.bench import Table as Table
from llamakern.bench import machine as machine
from llamakern.bench import race as race
from llamakern.bench import relative_error as relative_error

"""What a snap costs: ours beside the plain ways to write it, on the machine that runs this.

Behind ``tl-codebook bench``. Every peer of a case sees the same tensors; rounds are interleaved, so that a busy machine slows all of them;
medians are reported, and ratios within one run. Beside each time stands how many rows got other codes than float64 gives.
"""

from tl_codebook.benchmarks.cases import CASES_CPU, CASES_GPU, DTYPES, Case, Shape
from tl_codebook.benchmarks.peers import PEERS
from tl_codebook.benchmarks.provenance import where
from tl_codebook.benchmarks.runner import Settings, run_case
from tl_codebook.benchmarks.tables import model_table, snap_table

__all__ = ["CASES_CPU", "CASES_GPU", "DTYPES", "PEERS", "Case", "Settings", "Shape", "model_table", "run_case", "snap_table", "where"]

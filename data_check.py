"""过渡：读数据的代码在 finetune/data/rows.py 与 finetune/data/samples.py。"""

from finetune.data.rows import MAX_PROBLEMS, Problem, ProblemList, RawRow, check_file, iter_rows
from finetune.data.samples import RowOptions, Sample, parse_row, read_samples

__all__ = ["MAX_PROBLEMS", "Problem", "ProblemList", "RawRow", "RowOptions"]
__all__ += ["Sample", "check_file", "iter_rows", "parse_row", "read_samples"]

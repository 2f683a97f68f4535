"""What a Report looks like: a table, figures, and one page."""

from fastsharp.report.comparison import comparison_table as comparison_table
from fastsharp.report.comparison import plot_comparison as plot_comparison
from fastsharp.report.figures import write_figures as write_figures
from fastsharp.report.invariance import invariance_table as invariance_table
from fastsharp.report.invariance import plot_invariance as plot_invariance
from fastsharp.report.page import write_html as write_html
from fastsharp.report.table import report_table as report_table

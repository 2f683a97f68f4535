"""What a Report looks like: a table, figures, and one page."""

from fastsharp.report.figures import write_figures as write_figures
from fastsharp.report.page import write_html as write_html
from fastsharp.report.table import report_table as report_table

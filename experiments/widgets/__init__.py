"""What does a notebook display? Tables, page maps, watched steps, figures and sources, each with a form as plain text."""

from experiments.widgets.batch import STATES, watch
from experiments.widgets.pages import PageMap, page_map
from experiments.widgets.plots import plot_batch, plot_run
from experiments.widgets.sources import Beside, beside
from experiments.widgets.table import DisplayTable, counters

__all__ = ["STATES", "Beside", "DisplayTable", "PageMap", "beside", "counters", "page_map", "plot_batch", "plot_run", "watch"]

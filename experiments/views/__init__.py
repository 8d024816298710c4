"""What shows itself in a notebook, and reads well as plain text: tables, page maps, watched steps, figures and sources."""

from experiments.views.batch import STATES, watch
from experiments.views.pages import PageMap, page_map
from experiments.views.plots import plot_batch, plot_run
from experiments.views.sources import Beside, beside
from experiments.views.table import Shown, counters

__all__ = ["STATES", "Beside", "PageMap", "Shown", "beside", "counters", "page_map", "plot_batch", "plot_run", "watch"]

"""How does a report draw the figures of a run? A drawing has a bounded size, however many requests there were."""

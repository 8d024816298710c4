"""The figures of a run. Each takes numbers and gives a drawing whose size is bounded, however many requests there were."""

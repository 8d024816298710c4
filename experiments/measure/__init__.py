"""In which order do the engines of a run compute, and when are there enough blocks?"""

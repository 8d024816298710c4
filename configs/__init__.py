"""Hydra's configuration files, shipped as package data. Groups: engine, model, workload, measure, experiment."""

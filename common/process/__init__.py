"""Processes: how does a process start, watch, stop and communicate with another one?"""

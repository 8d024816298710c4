"""The machine: which processors, how much memory and how many threads may this process use?"""

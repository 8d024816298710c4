"""How does a run describe an engine, start it in a process of its own and send it commands?"""

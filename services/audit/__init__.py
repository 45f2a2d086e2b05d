"""The audit collector: keeps every sealed chain, and notices when one changes its story.

`server` takes calls, `desk` is the one thread that decides, `store` the bytes on disk. What a good
chain is, is decided in the core: grafos_core.collector. `__main__` wires them.
"""

"""The ledger: remembers who holds what, in one file, behind one writer.

Each file is one idea: `server` takes calls, `proto` reads and writes messages, `writer` is the one
thread that decides, `store` the bytes on disk, `records` how events stand in the chain, `wall` the
time that never goes back. `watchers` tells who listens, `nodes` tells nodes what they owe, `sender`
hands the chain to the collector, `meters` counts. `__main__` wires them.
"""

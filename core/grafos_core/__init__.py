"""Every decision that grafos takes, and nothing else.

No clock, no socket, no file, no thread, no dice: time comes in as `now_ms`, ids and keys come in as
arguments, and what should happen comes out as ordered effects. Whoever drives a core performs its
effects in the order in which they were returned; what must be durable stands before what is told.
"""

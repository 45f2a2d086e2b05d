"""The shell that every service runs in: clock, loop, server, flags, logs, health.

Below the four services and above none: nothing here knows what a lease means. It is the only place
of the services that reads a clock, waits, or catches every exception.
"""

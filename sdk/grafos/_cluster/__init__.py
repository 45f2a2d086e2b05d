"""A fabric on this machine: the services as processes, started, watched and started again.

One file per idea; nothing here imports a service, which are met as processes and on the wire.

    layout.py        where everything lies
    description.py   cluster.json, by which programs find the fabric
    machine.py       how much memory may be leased out here
    remembered.py    what a fabric was made with, for its next start
    programs.py      which process is started with which flags
    child.py         one process: start, announcement, end, pause before the next start
    identities.py    the authority, and the secrets that new processes show it
    processes.py     who has started whom
    readiness.py     asking a process whether it is ready
    logfile.py       logs that do not grow without bound
    supervisor.py    the loop that owns all of it
    telephone.py     the unix socket by which the supervisor is asked and told
    launch.py        starting a supervisor and waiting until its fabric is ready
"""
